from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from raybilevel.problem import BilevelProblem, Hyperparameters, Level
from raybilevel.problems.digits import DigitsLogistic
from raybilevel.search import config_for_refit
from raybilevel.search_state import Likelihood, Shrinkage
from raybilevel.space import Parameter, Space
from tests.tiny_problems import Parabola

NAMES = ("a", "b", "c", "d")
SPACE = Space(tuple(Parameter(("x", name), 0.0, 1.0) for name in NAMES))
RESULT = torch.tensor([0.9, 0.1, 0.8, 0.2], dtype=torch.double)
CONFIG = {"x": dict(zip(NAMES, RESULT.tolist(), strict=True)), "width": 3}


class Moved(BilevelProblem):
    """f = |y - x|^2 / 2 with y in R^4, so that y is x, and F is the mean of (y_j - target_j - noise)^2 over examples
    of each j. In each half of the examples its minimum is the target."""

    epochs = 1
    dtype = torch.double

    def __init__(self, target: Tensor, diverges_below: float = -math.inf) -> None:
        self.target, self.diverges_below = target, diverges_below

    def model(self) -> nn.Module:
        return nn.Linear(4, 1, bias=False)

    def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Any) -> Tensor:
        x = torch.stack([hyperparameters["x"][name] for name in NAMES])
        loss = (model.get_parameter("weight")[0] - x).square().sum() / 2
        return loss * math.nan if hyperparameters["x"]["a"] < self.diverges_below else loss

    def upper_loss(self, model: nn.Module, batch: Any) -> Tensor:
        return mse_loss(model(batch[0]), batch[1])

    def batches(self, level: Level, generator: torch.Generator | None) -> Any:
        noise = torch.tensor([0.1, -0.1], dtype=torch.double).repeat_interleave(4)
        yield torch.eye(4, dtype=torch.double).repeat(2, 1), (self.target.repeat(2) + noise).unsqueeze(1)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=1.0)

    def halves(self) -> Sequence[BilevelProblem]:
        return copy.copy(self), copy.copy(self)


def at(spread: float) -> Tensor:
    return 0.5 + spread * (RESULT - 0.5)


@pytest.mark.parametrize(
    ("best", "spread", "trainings"),
    # At 0.4 the losses at 0.5 and 0.25 differ by less than an error.
    [(1.0, 1.0, 4), (0.5, 0.5, 6), (0.4, 0.5, 6), (0.25, 0.25, 8), (0.0, 0.0, 8)],
)
def test_groups_are_as_near_together_as_examples_held_out_say(best: float, spread: float, trainings: int) -> None:
    found = config_for_refit(Moved(at(best)), CONFIG, SPACE)
    assert (found.spread, found.trainings) == (spread, trainings)
    assert found.config["width"] == 3
    assert list(found.config["x"].values()) == pytest.approx(at(spread).tolist())
    if spread == 1:
        assert found.gain is None
        return
    # Noise of both signs cancels.
    gain = ((at(1) - at(best)).square() - (at(spread) - at(best)).square()).mean().item()
    assert found.gain is not None and found.gain.mean == pytest.approx(gain)
    assert (found.gain.of, found.gain.examples) == ("upper_loss", 16)


@pytest.mark.parametrize(("kind", "optimism"), [("log_likelihood", 2.0), ("squared_error", None)])
def test_a_result_that_has_followed_the_chance_of_the_examples_more_is_brought_nearer(
    kind: Likelihood, optimism: float | None
) -> None:
    # Three hyperparameters are determined, two of them within the group, by one example.
    shrinkage = Shrinkage(((0, 1, 2, 3),), kind, 1, 1.0, (0.5,) * 4, 3.0, applied=True)
    problem = Moved(at(1))
    found = config_for_refit(problem, CONFIG, SPACE, shrinkage)
    assert (found.spread, found.trainings) == (0.0, 8)
    # F itself is lowest at the result. Its noise is 0.1.
    result, equal = 0.01, 0.01 + (at(1) - 0.5).square().mean().item()
    expected = result * math.exp(2 * 2) if optimism is None else result + optimism
    assert found.gain is not None and found.gain.mean == pytest.approx(expected - equal)
    # Of a group that follows no chance the result stays as it is.
    assert config_for_refit(problem, CONFIG, SPACE, replace(shrinkage, supported=1.0)).spread == 1.0


def test_where_there_is_nothing_to_compare_nothing_is_trained() -> None:
    class TrainsItself(Moved):
        def train(self, config: Any, report: Any, checkpoint: Any) -> nn.Module:
            raise AssertionError("it has no refit")

    equal = {"x": dict.fromkeys(NAMES, 0.5)}
    # Without halves, without a refit, with equal values, and with three hyperparameters, which are no group.
    for problem, config, space in (
        (Parabola(NAMES), CONFIG, SPACE),
        (TrainsItself(at(0)), CONFIG, SPACE),
        (Moved(at(0)), equal, SPACE),
        (Moved(at(0)), CONFIG, Space(SPACE.parameters[:3])),
    ):
        found = config_for_refit(problem, config, space)
        assert (found.config, found.spread, found.trainings) == (config, 1.0, 0)


def test_a_training_that_diverges_ends_the_comparison() -> None:
    found = config_for_refit(Moved(at(0), diverges_below=0.65), CONFIG, SPACE)
    assert (found.spread, found.trainings) == (0.5, 6)
    found = config_for_refit(Moved(at(0), diverges_below=1.0), CONFIG, SPACE)
    assert (found.config, found.spread, found.trainings) == (CONFIG, 1.0, 2)


def test_unknown_losses_of_examples_keep_the_result() -> None:
    class Root(Moved):
        def upper_loss(self, model: nn.Module, batch: Any) -> Tensor:
            return super().upper_loss(model, batch).sqrt()

    found = config_for_refit(Root(at(0)), CONFIG, SPACE)
    assert (found.config, found.spread, found.trainings) == (CONFIG, 1.0, 2)


def test_halves_divide_the_validation_examples_by_class() -> None:
    problem = DigitsLogistic(groups=4, train=30, validation=41)
    problem.patience = 3
    halves = problem.halves()
    inputs, labels = problem.splits["upper"]
    for half, other in (halves, halves[::-1]):
        (x, y), (held_out, _) = half.splits["lower"], half.splits["upper"]
        assert torch.equal(x[:30], problem.splits["lower"][0])
        assert torch.equal(x[30:], other.splits["upper"][0]) and len(held_out) in (20, 21)
        assert (2 * y[30:].bincount(minlength=10) - labels.bincount(minlength=10)).abs().max() <= 1
        # A refit has no early stopping, and a half that is sent to another process stays one.
        assert half.patience is None
        assert torch.equal(pickle.loads(pickle.dumps(half)).splits["upper"][0], held_out)
    held_out = torch.cat([half.splits["upper"][0] for half in halves])
    assert torch.equal(held_out.unique(dim=0), inputs.unique(dim=0)) and len(held_out) == 41
    assert "splits" not in pickle.loads(pickle.dumps(problem)).__dict__
