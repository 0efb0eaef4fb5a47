from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from ray import train as ray_train
from torch import Tensor, nn

from raybilevel import hypergradient_trainable
from raybilevel.data_parallel import data_parallel_trainable
from raybilevel.errors import ProblemError
from raybilevel.levels import Levels, as_tensors
from raybilevel.local import search
from raybilevel.lower_level import load_checkpoint, refit, train
from raybilevel.methods.default import Default
from raybilevel.optimistic import lower_upper_level
from raybilevel.optimizer import BilevelOptimizer
from raybilevel.problem import BilevelProblem, Hyperparameters, Level, minibatches
from raybilevel.problems.synthetic import ManyMinimisers
from raybilevel.upper_level import TrainedPoint, hypergradient
from tests.problems_for_tests import Ridge, vector


class FewRows(BilevelProblem):
    """Least squares with 20 weights and 6 rows: f = |A y - t - x|^2 / 12, F = |B y - u|^2 / 60, minibatches."""

    epochs = 400
    dtype = torch.double

    def __init__(self, optimistic: bool = True, dtype: torch.dtype = torch.double) -> None:
        generator = torch.Generator().manual_seed(1)
        self.optimistic, self.dtype = optimistic, dtype
        self.lower, self.upper = (
            (
                torch.randn(rows, 20, generator=generator, dtype=torch.double),
                torch.randn(rows, generator=generator, dtype=torch.double),
            )
            for rows in (6, 30)
        )

    def model(self) -> nn.Module:
        return nn.Linear(20, 1, bias=False)

    def errors(self, model: nn.Module, batch: Any) -> Tensor:
        errors: Tensor = model(batch[0]).squeeze(-1) - batch[1]
        return errors

    def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Any) -> Tensor:
        return (self.errors(model, batch) - hyperparameters["x"]).square().mean() / 2

    def upper_loss(self, model: nn.Module, batch: Any) -> Tensor:
        return self.errors(model, batch).square().mean() / 2

    def batches(self, level: Level, generator: torch.Generator | None) -> Iterator[Any]:
        return minibatches(self.lower if level == "lower" else self.upper, 5, generator)

    def refit_batches(self, generator: torch.Generator | None) -> Iterator[Any]:
        return self.batches("lower", generator)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {"first": model.get_parameter("weight")[0, 0].item()}

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.1)

    def lowest(self, x: float) -> float:
        """min F subject to A y = t + x, by dense algebra."""
        (a, t), (b, u) = self.lower, self.upper
        pinned = torch.linalg.pinv(a) @ (t + x)
        free = torch.linalg.svd(a).Vh[6:]
        z = torch.linalg.lstsq(b @ free.T, (u - b @ pinned)[:, None]).solution[:, 0]
        return ((b @ (pinned + free.T @ z) - u).square().mean() / 2).item()


@pytest.mark.parametrize("dtype", [torch.double, torch.float32])
def test_training_ends_at_the_minimiser_with_the_lowest_upper_level(dtype: torch.dtype) -> None:
    problem = FewRows(dtype=dtype)
    plain, _ = train(FewRows(optimistic=False, dtype=dtype), {"x": 0.3})
    found, _ = train(problem, {"x": 0.3})
    lowest = problem.lowest(0.3)
    assert plain.upper > 1.5 * lowest
    assert found.upper == pytest.approx(lowest, rel=5e-3)
    assert found.value <= plain.value + 1e-3 * lowest  # f is as low as the training left it, of about 1 at first
    assert plain.passes == 400 and 400 < found.passes <= 800 + 26 * Levels(problem, problem.model()).evaluation_passes()


def test_where_the_minimiser_is_unique_the_weights_stay() -> None:
    problem = Ridge()
    config = problem.config(vector(0.1, 2.0, 0.5))
    _, checkpoint = train(problem, config)
    model = problem.model().to(torch.double)
    model.load_state_dict(load_checkpoint(checkpoint)["model"])
    before = model.get_parameter("weight").detach().clone()
    lower_upper_level(Levels(problem, model), as_tensors(config, problem), 200)
    assert torch.allclose(model.get_parameter("weight"), before, atol=1e-6)


def test_hypergradient_is_that_of_the_lowest_upper_level() -> None:
    problem = ManyMinimisers(optimistic=True)
    unit = vector(0.2, 0.9)
    _, checkpoint = train(problem, problem.space.suggest(unit))
    model = problem.model().to(torch.double)
    model.load_state_dict(load_checkpoint(checkpoint)["model"])
    found = hypergradient(TrainedPoint(Levels(problem, model), problem.space, {}, unit), 0.05, 50).gradient
    x = 2 * unit - 1
    exact = 2 * (x - problem.target)  # of 0.1 + |x - e|^2 / 2, in the unit cube
    assert torch.allclose(found, exact, atol=0.02 * exact.norm().item())


def test_a_search_finds_the_optimistic_optimum() -> None:
    problem = ManyMinimisers(optimistic=True)
    optimizer = BilevelOptimizer(problem.space, Default(), 0)
    search(problem, optimizer, 12)
    best = optimizer.state.best
    assert best is not None and best.upper == pytest.approx(0.1, abs=2e-3)
    assert problem.optimum > 0.23  # where a search that trains plainly ends


def test_a_refit_sees_no_upper_level() -> None:
    assert refit(FewRows(), {"x": 0.3}) == refit(FewRows(optimistic=False), {"x": 0.3})


def test_what_cannot_choose_says_so() -> None:
    with pytest.raises(ProblemError, match=r"FewRows\.optimistic.*data_parallel_trainable"):
        data_parallel_trainable(FewRows(), ray_train.ScalingConfig(num_workers=2))
    with pytest.raises(ProblemError, match=r"FewRows\.optimistic.*hypergradient_trainable"):
        hypergradient_trainable(FewRows())
