from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raybilevel._lower.training import refit, train
from raybilevel.errors import ConfigError, DataError
from raybilevel.problem import BilevelProblem
from raybilevel.problems import _datasets as datasets
from raybilevel.problems import income
from raybilevel.problems._datasets import Images
from raybilevel.problems.cleaning import DigitsCleaning, HyperCleaning
from raybilevel.problems.income import Income
from raybilevel.problems.long_tail import LongTailed
from raybilevel.problems.mnist_kinds import Mnist1KKinds
from raybilevel.problems.ridge import Ridge, solve
from raybilevel.problems.synthetic import ManyMinimisers, SeveralOptima
from raybilevel.search import check_problem
from raybilevel.space import Parameter, Space, sobol_points


@pytest.fixture(autouse=True)
def readers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small random data sets instead of files."""
    classes = torch.randint(0, 200, (10, 28, 28), generator=torch.Generator().manual_seed(9))

    def images(n: int, seed: int) -> Images:
        labels = torch.arange(n) % 10
        noise = torch.randint(0, 56, (n, 28, 28), generator=torch.Generator().manual_seed(seed))
        return Images((classes[labels] + noise).to(torch.uint8), labels)

    def rows(folder: str, file: Any) -> tuple[Tensor, Tensor]:
        x = (torch.rand(90, 123, generator=torch.Generator().manual_seed(file.size)) < 0.2).double()
        return x, (x[:, 0] + x[:, 60] > 0).long()

    monkeypatch.setattr(datasets, "mnist", lambda folder: (images(600, 0), images(40, 1)))
    monkeypatch.setattr(datasets, "mnist_1k", lambda folder: (images(60, 2), images(40, 3)))
    monkeypatch.setattr(datasets, "has_mnist_test", lambda folder: False)
    if hasattr(income, "_rows"):
        monkeypatch.setattr(income, "_rows", rows)


def cleaning(**options: Any) -> HyperCleaning:
    return HyperCleaning(**{"data": "data", "train": 80, "validation": 50, "groups": 4, **options})


def long_tail(**options: Any) -> LongTailed:
    return LongTailed(**{"data": "data", "largest": 30, "validation": 50, **options})


def income_small(**options: Any) -> Income:
    return Income(**{"data": "data", "train": 40, "validation": 30, "groups": 3, **options})


def income_elastic() -> Income:
    return income_small(elastic=True)


MAKERS = [cleaning, DigitsCleaning, long_tail, income_small, income_elastic, Ridge, SeveralOptima, ManyMinimisers]


@pytest.mark.parametrize("make", MAKERS)
def test_every_problem_trains_the_same_twice_and_differentiably(make: Any) -> None:
    first, second = make(), make()
    check_problem(first, first.space)
    config = first.space.to_config(sobol_points(first.space.dimension, 1, 3)[0])
    one, two = train(first, config)[0], train(second, config)[0]
    # Not to the last bit: sums depend on how arrays happen to lie in memory.
    assert (one.upper_loss, one.lower_loss, one.passes) == pytest.approx(
        (two.upper_loss, two.lower_loss, two.passes), rel=1e-9
    )
    assert one.passes < 500


@pytest.mark.parametrize("make", MAKERS)
def test_danskin_gradient_agrees_with_differences_of_the_value(make: Any) -> None:
    problem: BilevelProblem = make()
    space: Space = problem.space  # type: ignore[attr-defined]
    unit = torch.full((space.dimension,), 0.6, dtype=torch.double)
    gradient = train(problem, space.to_config(unit))[0].lower_gradient
    first = space.parameters[0]
    slope = space.value(gradient, first) * first.slope(space.value(space.to_config(unit), first))
    step = torch.zeros_like(unit)
    step[0] = 5e-3
    values = [train(problem, space.to_config(unit + sign * step))[0].lower_loss for sign in (1, -1)]
    # Trained values are exact to about 1e-7, the difference quotient to its step squared.
    assert (values[0] - values[1]) / 1e-2 == pytest.approx(slope, abs=1e-4, rel=5e-3)


def test_cleaning_spoils_more_labels_from_group_to_group_and_no_others() -> None:
    problem, clean = cleaning(), cleaning(wrong=0.0)
    wrong = problem.splits["lower"][1] != clean.splits["lower"][1]
    shares = [wrong[problem.group == g].double().mean().item() for g in range(4)]
    assert shares == pytest.approx([0, 0.25, 0.55, 0.8], abs=0.03)  # of 20: rounded to whole images
    assert torch.equal(problem.splits["upper"][1], clean.splits["upper"][1])


def test_cleaning_with_weight_zero_ignores_a_group() -> None:
    problem = cleaning()
    weights = {"weight": {"g0": 1.0, "g1": 0.5, "g2": 0.2, "g3": 0.0}}
    before = train(problem, weights)[0].lower_loss
    problem.splits["lower"][0][problem.group == 3] = 0.7
    assert train(problem, weights)[0].lower_loss == pytest.approx(before)


def test_cleaning_refit_takes_validation_images_in() -> None:
    (batch,) = cleaning().refit_batches(None)
    assert len(batch.x) == batch.examples == 130
    assert batch.group.bincount().tolist() == [20, 20, 20, 20, 50]  # type: ignore[attr-defined]


def test_long_tail_counts_fall_by_the_ratio_and_validation_is_balanced() -> None:
    problem = long_tail(ratio=10.0)
    assert problem.splits["lower"][1].bincount().tolist() == problem.counts
    assert problem.counts[0] == 30 and problem.counts[-1] == 3
    assert problem.splits["upper"][1].bincount().tolist() == [5] * 10


def test_long_tail_shift_of_all_classes_alike_changes_nothing() -> None:
    problem = long_tail()
    config = problem.space.to_config(torch.full((20,), 0.5).double())
    before = train(problem, config)[0].upper_loss
    config["shift"] = dict.fromkeys(config["shift"], 2.0)
    assert train(problem, config)[0].upper_loss == pytest.approx(before, rel=1e-6)


def test_long_tail_refit_has_test_metrics() -> None:
    metrics = refit(long_tail(), long_tail().space.to_config(torch.full((20,), 0.5).double()))
    assert metrics is not None and set(metrics) == {"test_loss", "test_accuracy"}


def test_kinds_have_a_decay_for_weights_and_for_biases() -> None:
    problem = Mnist1KKinds("data", hidden=(8,), epochs=1)
    paths = [(kind, layer) for kind in ("weight_decay", "bias_decay") for layer in ("fc1", "fc2")]
    check_problem(problem, Space(tuple(Parameter(path, 0.1, 10.0, log=True) for path in paths)))


@pytest.mark.parametrize("groups", [1, 5, 30])
def test_ridge_training_is_the_closed_form_and_the_optimum_is_one(groups: int) -> None:
    problem = Ridge(groups)
    best = {"decay": {f"g{g}": value.item() for g, value in enumerate(problem.best_decay)}}
    observed, _ = train(problem, best)
    assert observed.upper_loss == pytest.approx(problem.optimum, rel=1e-6)
    x, target = problem.splits["lower"]
    weights = solve(x, target, problem.best_decay[problem.group])
    closed = (x @ weights - target).square().mean() / 2
    closed = closed + (problem.best_decay[problem.group] * weights[:, 0].square()).sum() / 2
    assert observed.lower_loss == pytest.approx(closed.item(), rel=1e-7)
    for unit in sobol_points(groups, 3, 0):
        assert train(problem, problem.space.to_config(unit))[0].upper_loss > problem.optimum


@pytest.mark.parametrize("dimension", [2, 6])
def test_several_optima_has_one_in_each_well_and_the_first_is_global(dimension: int) -> None:
    problem = SeveralOptima(dimension)
    ends = []
    for centre in problem.centres:
        y = centre.clone()
        for _ in range(500):
            y = y - 0.05 * torch.func.grad(problem.value)(y)
        assert (y - centre).norm() < 0.1
        ends.append(problem.value(y).item())
    assert ends == sorted(ends) and ends[0] == pytest.approx(problem.optimum, abs=1e-9)
    points = 2 * sobol_points(dimension, 2000, 1) - 1
    assert min(problem.value(y).item() for y in points) > problem.optimum


def test_several_optima_trains_to_x() -> None:
    problem = SeveralOptima(2)
    x = {"x0": problem.minimiser[0].item(), "x1": problem.minimiser[1].item()}
    assert train(problem, x)[0].upper_loss == pytest.approx(problem.optimum, abs=1e-9)


def test_many_minimisers_trained_and_optimistic_optimum_differ() -> None:
    problem = ManyMinimisers()
    at_target = train(problem, {"x0": 0.6, "x1": -0.4})[0]
    assert at_target.metrics["optimistic_loss"] == pytest.approx(0.1)
    assert at_target.upper_loss > problem.optimum
    hessian = torch.eye(2).double() + problem.coupling.T @ problem.coupling
    x = torch.linalg.solve(hessian, problem.target)
    observed = train(problem, {"x0": x[0].item(), "x1": x[1].item()})[0]
    assert observed.upper_loss == pytest.approx(problem.optimum, abs=1e-6)  # fifty steps of gradient descent
    assert observed.metrics["optimistic_loss"] > 0.11


@pytest.mark.parametrize(
    ("make", "options", "told"),
    [
        (cleaning, {"groups": 100}, "80"),
        (cleaning, {"wrong": 1.5}, "1.5"),
        (long_tail, {"ratio": 0}, "ratio"),
        (income_small, {"groups": 200}, "200"),
        (Ridge, {"groups": 31}, "31"),
        (SeveralOptima, {"wells": 17}, "17"),
        (ManyMinimisers, {"weights": 2}, "2"),
    ],
)
def test_wrong_options_are_named(make: Any, options: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        make(**options)


def test_an_elastic_penalty_adds_the_absolute_weights_of_each_group() -> None:
    plain, elastic = income_small(), income_elastic()
    assert elastic.space.names == (*plain.space.names, *(f"l1/g{g}" for g in range(3)))
    model = nn.Linear(123, 2).double()
    nn.init.normal_(model.weight, generator=torch.Generator().manual_seed(0))
    hyperparameters = elastic.space.decode(torch.tensor([0.5, 0.6, 0.7, 0.8, 0.9, 1.0], dtype=torch.double))
    (batch,) = elastic.batches("lower", None)
    added = elastic.lower_loss(model, hyperparameters, batch) - plain.lower_loss(model, hyperparameters, batch)
    sums = model.weight.detach().abs().sum(0).reshape(3, 41).sum(1)
    wanted = sum(hyperparameters["l1"][f"g{g}"] * sums[g] for g in range(3))
    # Each weight counts for less by up to its smoothing, 0.01.
    assert added.item() == pytest.approx(wanted.item(), rel=0.02)


def test_income_names_a_missing_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with pytest.raises(DataError, match="a9a"):
        Income(str(tmp_path)).splits  # noqa: B018
