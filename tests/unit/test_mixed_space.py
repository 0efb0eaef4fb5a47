"""Searches in which some hyperparameters have no gradient."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raybilevel.errors import ConfigError
from raybilevel.methods import Default, make_method
from raybilevel.problem import Hyperparameters, Level
from raybilevel.search import BilevelOptimizer, check_problem, search
from raybilevel.space import Parameter, Space, with_priors
from tests.tiny_problems import TwoWeights

SHIFTS = {"low": -0.5, "middle": 0.1, "high": 0.9}


class Mixed(TwoWeights):
    """f = |y - (a, b)|^2 + decay |y|^2, whose minimiser is (a, b) / (1 + decay); F = |y - (0.3, 0.6)|^2 + a shift by
    the kind + (n - 3)^2 / 10 + (log10 rate + 2)^2 / 10, which is least at kind "low", n = 3, rate = 0.01, decay = 0,
    a = 0.3 and b = 0.6."""

    epochs = 30

    def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Tensor) -> Tensor:
        aim = torch.stack([hyperparameters["a"], hyperparameters["b"]])
        y = model.get_parameter("weight").flatten()
        return (y - aim).square().sum() + hyperparameters["decay"] * y.square().sum()

    def upper_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Tensor) -> Tensor:
        y = model.get_parameter("weight").flatten()
        error = (y - torch.tensor([0.3, 0.6], dtype=torch.double)).square().sum()
        layers = (hyperparameters["layers"] - 3) ** 2 / 10
        rate = (math.log10(hyperparameters["rate"].item()) + 2) ** 2 / 10
        return error + SHIFTS[hyperparameters["kind"]] + layers + rate

    def batches(self, level: Level, generator: torch.Generator | None) -> Iterator[Tensor]:
        yield torch.zeros(1, 1)


SPACE = Space(
    (
        Parameter(("a",), -1.0, 1.0),
        Parameter(("b",), -1.0, 1.0),
        Parameter.of_choices(("kind",), ["high", "low", "middle"]),
        Parameter(("decay",), 1e-3, 1.0, log=True),
        Parameter.of(("layers",), "randint", (1, 6)),
        Parameter(("rate",), 1e-4, 1.0, log=True),
    )
)


def test_what_has_a_gradient_is_found() -> None:
    assert check_problem(Mixed(), SPACE).smooth == (True, True, False, True, False, False)


def test_a_search_finds_the_best_choice_and_whole_number() -> None:
    problem = Mixed()
    optimizer = BilevelOptimizer(SPACE, Default(), seed=0)
    search(problem, optimizer, cost=30)
    best = optimizer.method.incumbent(optimizer.state)
    assert best is not None
    found = optimizer.config_of(best)
    assert found["kind"] == "low" and found["layers"] == 3
    assert best.upper_loss == pytest.approx(-0.5, abs=0.05)
    kinds = {optimizer.config_of(t)["kind"] for t in optimizer.state.trainings[:5]}
    assert kinds == set(SHIFTS)  # the start design meets every choice


def test_hypergradients_are_those_of_the_smooth_hyperparameters() -> None:
    problem = Mixed()
    optimizer = BilevelOptimizer(SPACE, Default(), seed=1)
    search(problem, optimizer, cost=12)
    known = [t for t in optimizer.state.done if t.hypergradient]
    assert known
    for training in known:
        config = optimizer.config_of(training)
        y = torch.tensor([config["a"], config["b"]]) / (1 + config["decay"])
        slope = 2 * (y - torch.tensor([0.3, 0.6]))
        in_a, in_b = (2 * slope / (1 + config["decay"])).tolist()  # a unit of the cube is 2 of a
        in_decay = -(slope * y).sum().item() / (1 + config["decay"]) * config["decay"] * math.log(1e3)
        gradient = training.hypergradient
        assert gradient is not None
        expected = [in_a, in_b, math.nan, in_decay, math.nan, math.nan]
        # 1 / (h + 1 / time) stands for 1 / h, with a curvature h of at least 2 and a time of 30 steps of 0.3
        assert list(gradient) == pytest.approx(expected, rel=0.06, abs=5e-3, nan_ok=True)


def test_without_any_gradient_the_search_goes_by_values() -> None:
    problem = Mixed()
    constants = {"a": 0.3, "b": 0.6, "decay": 1e-3}
    space = Space(tuple(p for p in SPACE.parameters if p.name in ("kind", "layers", "rate")))
    optimizer = BilevelOptimizer(space, Default(), seed=0)
    search(problem, optimizer, 25, constants)
    best = optimizer.state.best
    assert best is not None and optimizer.config_of(best)["kind"] == "low"
    assert best.upper_loss == pytest.approx(-0.5, abs=0.03)
    assert all(step.passes == 0 for step in optimizer.state.steps)


def origins(space: Space, constants: Any = None, **settings: Any) -> set[str]:
    """Of all proposals of a search but its start design."""
    optimizer = BilevelOptimizer(space, Default(**settings), seed=0)
    search(Mixed(), optimizer, 20, constants)
    return {t.proposal.origin for t in optimizer.state.trainings} - {"start"}


def test_by_values_alone_every_step_looks_at_the_whole_box() -> None:
    constants = {"a": 0.3, "b": 0.6, "decay": 1e-3}
    space = Space(tuple(p for p in SPACE.parameters if p.name in ("kind", "layers", "rate")))
    assert origins(space, constants) == {"global", "fill"}
    assert origins(SPACE, hypergradients=False) == {"global", "fill"}
    # A user's prior would weigh on all of them.
    assert "region" in origins(with_priors(space, {"rate": (1e-2, 0.5)}), constants)


def test_where_hypergradients_are_looked_for_in_vain_steps_look_at_the_whole_box(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert "region" in origins(SPACE)
    # Of trainings that are too short to pay for one.
    monkeypatch.setattr(Mixed, "epochs", 2)
    assert origins(SPACE) == {"global", "fill"}


@pytest.mark.parametrize("method", ["paper", "hypergradient"])
def test_methods_that_need_every_gradient_say_so(method: str) -> None:
    optimizer = BilevelOptimizer(SPACE, make_method(method), seed=0)
    with pytest.raises(ConfigError, match="none in kind, layers, rate; use method='default'"):
        search(Mixed(), optimizer, cost=3)


def test_a_mixed_search_is_saved_and_goes_on(tmp_path: Any) -> None:
    def begun(cost: float) -> BilevelOptimizer:
        optimizer = BilevelOptimizer(SPACE, Default(), seed=2)
        search(Mixed(), optimizer, cost)
        return optimizer

    first = begun(12)
    again = BilevelOptimizer.from_saved(first.saved(), Default())
    assert again.space == first.space
    first_step, again_step = first.plan(), again.plan()
    assert (first_step is None) == (again_step is None)
    assert [t.unit for t in again.state.trainings] == [t.unit for t in first.state.trainings]
