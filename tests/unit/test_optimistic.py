from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from ray import train as ray_train
from torch import Tensor, nn

from raybilevel import hypergradient_trainable
from raybilevel._descents.fixed_x import Budget, lagrangian_point
from raybilevel._lower.levels import Levels
from raybilevel._lower.optimistic import select_minimiser
from raybilevel._lower.training import load_checkpoint, refit, train
from raybilevel.errors import ProblemError
from raybilevel.methods._default import Default
from raybilevel.problem import BilevelProblem, Hyperparameters, Level, minibatches
from raybilevel.problems.synthetic import ManyMinimisers
from raybilevel.search._local import search
from raybilevel.search._optimizer import BilevelOptimizer
from raybilevel.tune._data_parallel import data_parallel_trainable
from tests.problems_for_tests import Ridge, levels_at, point_at, vector


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


def trained(problem: BilevelProblem, config: dict[str, Any]) -> tuple[Levels, Tensor, Tensor]:
    """Both levels at weights that were trained plainly, x and these."""
    plain = copy.copy(problem)
    plain.optimistic = False
    model = problem.model().to(problem.dtype)
    model.load_state_dict(load_checkpoint(train(plain, config)[1])["model"])
    return levels_at(problem, model, config)


@pytest.mark.parametrize("dtype", [torch.double, torch.float32])
def test_training_ends_at_the_minimiser_with_the_lowest_upper_level(dtype: torch.dtype) -> None:
    problem = FewRows(dtype=dtype)
    plain, _ = train(FewRows(optimistic=False, dtype=dtype), {"x": 0.3})
    found, _ = train(problem, {"x": 0.3})
    lowest = problem.lowest(0.3)
    assert plain.upper_loss > 1.5 * lowest
    assert found.upper_loss == pytest.approx(lowest, rel=5e-3)
    assert found.lower_loss < 1e-6  # of about 1 at first
    assert abs(found.lower_gradient["x"]) < 1e-3  # Danskin: f is 0 at its minimisers, whatever x
    assert plain.passes == 401  # an epoch each, and df/dx at the end
    assert 401 < found.passes <= 801 + 6  # F is charged after f has been


@pytest.mark.parametrize("passes", [0.0, 3.0, 12.0, 25.0])
def test_with_too_few_passes_the_trained_weights_are_kept(passes: float, caplog: pytest.LogCaptureFixture) -> None:
    problem = FewRows()
    levels, x, before = trained(problem, {"x": 0.3})
    assert not select_minimiser(levels, x, passes)
    assert torch.equal(levels.y, before)
    assert "trained weights are kept" in caplog.text
    assert levels.passes <= passes + 1 + 2 * 6  # f and F once at the start; each is charged when it has been taken


@pytest.mark.parametrize("rate", [0.3, 0.02])
def test_where_the_minimiser_is_unique_f_does_not_rise_and_upper_hardly_falls(rate: float) -> None:
    """Also far from a stationary point, where going on with the training would lower F."""
    problem = Ridge(epochs=40, optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=rate))
    config = problem.config(vector(0.1, 2.0, 0.5))
    levels, x, y = trained(problem, config)
    upper = levels.value("upper", x, y)
    select_minimiser(levels, x, 400)
    assert 0.995 * upper < levels.value("upper", x, levels.y) <= upper


class Walled(ManyMinimisers):
    """F is not finite beyond a wall in one of the directions in which f is flat."""

    def upper_loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        free = self.free @ model.get_parameter("y")
        return super().upper_loss(model, batch) - 0.01 * torch.log(1e-3 - free[0]).sum()


def test_a_loss_that_is_not_finite_on_the_way_costs_no_training() -> None:
    problem = Walled(optimistic=True)
    plain, _ = train(Walled(), {"x0": 0.6, "x1": -0.4})
    found, _ = train(problem, {"x0": 0.6, "x1": -0.4})
    assert found.upper_loss <= plain.upper_loss
    assert found.lower_loss < 1e-4


def test_hypergradient_is_that_of_the_lowest_upper_level() -> None:
    problem = ManyMinimisers(optimistic=True)
    unit = vector(0.2, 0.9)
    _, checkpoint = train(problem, problem.space.to_config(unit))
    model = problem.model().to(torch.double)
    model.load_state_dict(load_checkpoint(checkpoint)["model"])
    found = lagrangian_point(point_at(problem, model, unit), 0.05, Budget(50, 50)).gradient
    x = 2 * unit - 1
    exact = 2 * (x - problem.target)  # of 0.1 + |x - e|^2 / 2, in the unit cube
    assert torch.allclose(found, exact, atol=0.02 * exact.norm().item())


def test_a_search_finds_the_optimistic_optimum() -> None:
    problem = ManyMinimisers(optimistic=True)
    optimizer = BilevelOptimizer(problem.space, Default(), 0)
    search(problem, optimizer, 12)
    best = optimizer.state.best
    assert best is not None and best.upper_loss == pytest.approx(0.1, abs=2e-3)
    assert ManyMinimisers().optimum > 0.23  # where a search that trains plainly ends


def test_a_refit_sees_no_upper_level() -> None:
    assert refit(FewRows(), {"x": 0.3}) == refit(FewRows(optimistic=False), {"x": 0.3})


def test_what_cannot_choose_says_so() -> None:
    with pytest.raises(ProblemError, match=r"FewRows\.optimistic.*data_parallel_trainable"):
        data_parallel_trainable(FewRows(), ray_train.ScalingConfig(num_workers=2))
    with pytest.raises(ProblemError, match=r"FewRows\.optimistic.*hypergradient_trainable"):
        hypergradient_trainable(FewRows())
