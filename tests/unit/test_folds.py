"""Cross-validation as the upper level."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.model_selection import GroupKFold, RepeatedKFold
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from raybilevel import BilevelProblem, CrossValidated
from raybilevel._lower.likelihood import upper_likelihood
from raybilevel._lower.own_loop import train_itself
from raybilevel._lower.training import load_checkpoint, refit, train
from raybilevel.errors import ConfigError, ProblemError
from raybilevel.methods import Default
from raybilevel.search import BilevelOptimizer, search
from raybilevel.space import Parameter, Space

CONFIG = {"decay": {"a": 0.1, "b": 0.3}}
EXAMPLES = 23
X = torch.randn(EXAMPLES, 4, generator=torch.Generator().manual_seed(0), dtype=torch.double)
T = X @ torch.tensor([[1.0], [2.0], [0.1], [0.0]], dtype=torch.double) + torch.randn(
    EXAMPLES, 1, generator=torch.Generator().manual_seed(1), dtype=torch.double
)


class Line(BilevelProblem):
    """Ridge regression with one decay for two features each."""

    epochs = 3
    dtype = torch.double

    def __init__(self, train: Any, held_out: Any) -> None:
        self.data = {"lower": (X[train], T[train]), "upper": (X[held_out], T[held_out])}

    @property
    def space(self) -> Space:
        return Space(tuple(Parameter(("decay", name), 1e-3, 10.0, log=True) for name in "ab"))

    def model(self) -> nn.Module:
        return nn.Linear(4, 1, bias=False)

    def lower_loss(self, model: nn.Module, hyperparameters: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        decay = torch.stack([hyperparameters["decay"][name] for name in "aabb"])
        return mse_loss(model(batch[0]), batch[1]) / 2 + (decay * model.weight.square()).sum() / 2

    def upper_loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return mse_loss(model(batch[0]), batch[1])

    def batches(self, level: str, generator: Any) -> Any:
        yield self.data[level]

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(
            model.parameters(), max_iter=60, tolerance_grad=1e-9, tolerance_change=1e-14, line_search_fn="strong_wolfe"
        )

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {"first_weight": model.weight[0, 0].item()}


class Optimistic(Line):
    optimistic = True


def solved(rows: Any, decay: tuple[float, float] = (0.1, 0.3)) -> Tensor:
    penalty = torch.diag(torch.tensor(decay, dtype=torch.double).repeat_interleave(2))
    return torch.linalg.solve(X[rows].T @ X[rows] / len(rows) + penalty, X[rows].T @ T[rows] / len(rows))


def errors(folds: Any, decay: tuple[float, float] = (0.1, 0.3)) -> list[Tensor]:
    return [(X[held] @ solved(rows, decay) - T[held]).square() for rows, held in folds]


def splits(count: int) -> list[tuple[Any, Any]]:
    every = np.arange(EXAMPLES)
    return [(np.setdiff1d(every, held), held) for held in np.array_split(every, count)]


def test_f_is_the_mean_over_examples_each_held_out_once() -> None:
    problem = CrossValidated(Line, EXAMPLES, folds=4)
    trained, _ = train(problem, CONFIG)
    found = errors(splits(4))
    assert trained.upper_loss == pytest.approx(torch.cat(found).mean().item(), rel=1e-6)
    of_folds = [float(fold.mean()) for fold in found]
    assert [trained.metrics[f"fold_{k}"] for k in range(4)] == pytest.approx(of_folds, rel=1e-6)
    assert trained.metrics["standard_error"] == pytest.approx(np.std(of_folds, ddof=1) / 2, rel=1e-6)
    first = np.mean([solved(rows)[0].item() for rows, _ in splits(4)])
    assert trained.metrics["first_weight"] == pytest.approx(first, rel=1e-6)


def test_a_training_is_charged_the_mean_of_its_folds() -> None:
    problem = CrossValidated(Line, EXAMPLES, folds=4)
    alone = [train(fold, CONFIG)[0].passes - 1 for fold in problem.problems]  # less the pass of df/dx
    assert train(problem, CONFIG)[0].passes - 1 == pytest.approx(np.mean(alone))


@pytest.mark.parametrize(
    ("folds", "groups", "count"),
    [(RepeatedKFold(n_splits=3, n_repeats=2, random_state=0), None, 6), (GroupKFold(3), np.arange(EXAMPLES) // 5, 3)],
    ids=["repeated", "grouped"],
)
def test_folds_are_those_of_a_splitter(folds: Any, groups: Any, count: int) -> None:
    problem = CrossValidated(Line, EXAMPLES, folds, groups=groups)
    expected = errors(list(folds.split(X, None, groups)))
    assert len(problem.problems) == len(expected) == count
    assert train(problem, CONFIG)[0].upper_loss == pytest.approx(torch.cat(expected).mean().item(), rel=1e-6)


def test_an_example_that_is_held_out_twice_is_one_example() -> None:
    problem = CrossValidated(Line, EXAMPLES, RepeatedKFold(n_splits=3, n_repeats=2, random_state=0))
    known = upper_likelihood(problem, {"decay": {"a": torch.tensor(0.1), "b": torch.tensor(0.1)}}, CONFIG)
    assert known.examples == EXAMPLES


def test_each_fold_is_reported_and_not_trained_again() -> None:
    problem = CrossValidated(Line, EXAMPLES, folds=4)
    told: list[tuple[dict[str, Any], bytes | None]] = []
    whole = train_itself(problem, CONFIG, 0, lambda metrics, saved: told.append((metrics, saved)))
    of_folds = [float(fold.mean()) for fold in errors(splits(4))]
    means = [np.mean(of_folds[: k + 1]) for k in range(4)]
    assert [metrics["upper_loss"] for metrics, _ in told] == pytest.approx(means, rel=1e-6)
    later: list[dict[str, Any]] = []
    resumed = train_itself(problem, CONFIG, 0, lambda metrics, _: later.append(metrics), told[2][1])
    assert len(later) == 1 and later[0]["upper_loss"] == told[3][0]["upper_loss"]
    assert resumed.losses() == whole.losses() and resumed.passes == whole.passes
    resumed = train_itself(problem, CONFIG, 0, begun=told[3][1])
    assert resumed.losses() == whole.losses()
    assert resumed.trained == whole.trained


class Stepped(Line):
    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)


def test_weights_of_each_fold_have_the_time_that_they_were_trained() -> None:
    problem = CrossValidated(Stepped, EXAMPLES, folds=3)
    saved: list[bytes | None] = []
    whole = train_itself(problem, CONFIG, 0, lambda _, checkpoint: saved.append(checkpoint))
    for training in (
        whole,
        train_itself(problem, CONFIG, 0, begun=saved[0]),
        train_itself(problem, CONFIG, 0, begun=saved[2]),
    ):
        found = load_checkpoint(training.dump())["time"]
        assert {name: time.item() for name, time in found.items()} == pytest.approx(
            {f"{fold}.weight": 0.1 / (1 - 0.5) * Line.epochs for fold in range(3)}
        )


def test_a_refit_trains_on_all_examples() -> None:
    found = refit(CrossValidated(Line, EXAMPLES, folds=4), CONFIG)
    assert found is not None
    assert found["first_weight"] == pytest.approx(solved(np.arange(EXAMPLES))[0].item(), rel=1e-6)


@pytest.mark.slow
def test_a_search_finds_the_lowest_cross_validated_loss() -> None:
    problem = CrossValidated(Line, EXAMPLES, folds=4)
    assert problem.space is not None
    optimizer = BilevelOptimizer(problem.space, Default(), seed=0)
    search(problem, optimizer, 14)
    grid = torch.logspace(-3, 1, 25, dtype=torch.double).tolist()
    lowest = min(torch.cat(errors(splits(4), (a, b))).mean().item() for a in grid for b in grid)
    assert optimizer.state.best is not None
    assert optimizer.state.best.upper_loss < lowest * 1.005  # of regions that have settled
    gradients = [t for t in optimizer.state.trainings if t.hypergradient]
    assert gradients
    known = upper_likelihood(problem, {"decay": {"a": torch.tensor(0.1), "b": torch.tensor(0.1)}}, CONFIG)
    assert (known.kind, known.examples) == ("squared_error", EXAMPLES)


def test_bad_folds_are_named() -> None:
    with pytest.raises(ConfigError, match="folds must be from 2 to the number of examples, 23, got 1"):
        CrossValidated(Line, EXAMPLES, folds=1)
    with pytest.raises(ConfigError, match=r"at least two splits into \(train, held out\), got 1"):
        CrossValidated(Line, EXAMPLES, folds=splits(4)[:1])
    with pytest.raises(ProblemError, match=r"Optimistic.optimistic: a cross-validated problem does not have it"):
        CrossValidated(Optimistic, EXAMPLES)
