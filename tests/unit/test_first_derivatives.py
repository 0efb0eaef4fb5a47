"""Gradients that the values of a loss contradict are found out before anything is trained."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from raybilevel.errors import ConfigError
from raybilevel.methods import HypergradientDescent, make_method
from raybilevel.problem import Hyperparameters
from raybilevel.search import BilevelOptimizer, check_problem, search
from raybilevel.search._checks import check_search, check_upper_variables
from raybilevel.search._first_derivatives import contradicted
from raybilevel.space import Parameter, Space
from tests.problems_for_tests import Network
from tests.tiny_problems import ManyParabolas

SPACE = Space((Parameter(("decay",), 1e-4, 1.0, log=True), Parameter(("last",), 1e-4, 1.0, log=True)))
WRONG = "of what its gradient says"


def straight_through(value: Tensor, bits: int) -> Tensor:
    """Quantised, with the gradient of the identity."""
    step = (value.abs().max().clamp_min(1e-3) / 2 ** (bits - 1)).detach()
    return value + ((value / step).round() * step - value).detach()


def plain(model: Any, x: Tensor) -> Tensor:
    found: Tensor = model(x)
    return found


def quantised_weights(bits: int) -> Callable[[Any, Tensor], Tensor]:
    def outputs(model: Any, x: Tensor) -> Tensor:
        for layer in model:
            linear = isinstance(layer, nn.Linear)
            x = F.linear(x, straight_through(layer.weight, bits), layer.bias) if linear else layer(x)
        return x

    return outputs


def quantised_activations(model: Any, x: Tensor) -> Tensor:
    found: Tensor = model[1:](straight_through(model[0](x), 8))
    return found


def coarse(model: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        found: Tensor = model(x)
    return found.float()


class Computed(Network):
    """outputs: of a model at inputs; scale, shift: of both losses; keeps: has a float32 tensor of its own."""

    epochs = 3

    def __init__(
        self,
        outputs: Callable[[Any, Tensor], Tensor] = plain,
        scale: float = 1.0,
        shift: float = 0.0,
        keeps: bool = False,
        use: Callable[[Tensor], Any] = lambda last: last,
    ) -> None:
        super().__init__()
        self.outputs, self.scale, self.shift, self.use = outputs, scale, shift, use
        self.weight = torch.ones(2) if keeps else None

    def loss(self, model: Any, batch: Any) -> Tensor:
        return F.cross_entropy(self.outputs(model, batch[0]), batch[1], weight=self.weight)

    def lower_loss(self, model: Any, hyperparameters: Hyperparameters, batch: Any) -> Tensor:
        penalty = model[-1].weight.square().sum()
        last = self.use(hyperparameters["last"]) * model[-1].weight.abs().sum()
        return self.scale * (self.loss(model, batch) + hyperparameters["decay"] * penalty + last) + self.shift

    def upper_loss(self, model: Any, batch: Any) -> Tensor:
        return self.scale * self.loss(model, batch) + self.shift


# Eight bits are hardly more than rounding in single precision, in which alone the last one can be computed.
@pytest.mark.parametrize(
    ("outputs", "keeps"),
    [(quantised_weights(2), False), (quantised_weights(8), False), (quantised_activations, False),
     (quantised_weights(2), True)],
)  # fmt: skip
def test_a_gradient_passed_straight_through_is_not_followed(
    outputs: Any, keeps: bool, caplog: pytest.LogCaptureFixture
) -> None:
    problem = Computed(outputs, keeps=keeps)
    assert check_problem(problem, SPACE).smooth == (False, False)
    assert any(WRONG in message and "searched" in message for message in caplog.messages)
    with pytest.raises(ConfigError, match="follows gradients in every hyperparameter"):
        check_search(problem, SPACE, {}, HypergradientDescent())


def test_a_search_of_such_a_problem_goes_by_values(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    optimizer = BilevelOptimizer(SPACE, make_method("default"), seed=0)
    search(Computed(quantised_weights(2)), optimizer, cost=7)
    assert sum(WRONG in message for message in caplog.messages) <= 2  # once a level
    assert optimizer.state.steps and not any(training.hypergradient for training in optimizer.state.trainings)
    assert all(step.passes == 0 for step in optimizer.state.steps)


@pytest.mark.parametrize(
    "problem",
    [
        Computed(),
        Computed(keeps=True),
        Computed(scale=1e-8),
        Computed(shift=1e4),
        Computed(shift=1e4, keeps=True),
        Computed(coarse),
        Computed(coarse, keeps=True),
        Computed(lambda model, x: F.max_pool1d(model(F.hardtanh(x)).repeat(1, 2).abs(), 2)),
        Computed(lambda model, x: model(torch.zeros_like(x)).relu()),
        Computed(lambda model, x: model[3:](model[:3](x).detach())),  # layers that do not move
        Computed(lambda model, x: model(x).bfloat16().float()),
    ],
    ids=["plain", "single", "tiny", "shift", "single_shift", "coarse", "single_coarse", "kinks", "zeros", "frozen",
         "cast"],
)  # fmt: skip
def test_what_is_no_contradiction(problem: Computed, caplog: pytest.LogCaptureFixture) -> None:
    check_problem(problem, SPACE)
    assert WRONG not in caplog.text


def test_a_part_that_is_detached_from_the_weights(caplog: pytest.LogCaptureFixture) -> None:
    def consistent(model: Any, x: Tensor) -> Tensor:
        found: Tensor = model(x)
        return found + 10 * (found - found.detach())

    assert check_problem(Computed(consistent), SPACE).smooth == (False, False)


@pytest.mark.parametrize(
    "change",
    [lambda loss, wrong: wrong + 0 * loss, lambda loss, wrong: loss.round(decimals=2)],
    ids=["accuracy", "rounded"],
)
def test_a_gradient_that_is_0_where_f_is_not_constant(change: Any, caplog: pytest.LogCaptureFixture) -> None:
    class Steps(Computed):
        def upper_loss(self, model: Any, batch: Any) -> Tensor:
            wrong = (model(batch[0]).argmax(1) != batch[1]).float().mean()
            found: Tensor = change(super().upper_loss(model, batch), wrong)
            return found

    assert check_problem(Steps(), SPACE).smooth == (False, False)
    assert "Steps.upper_loss changes with the weights while its gradient is 0" in caplog.text


def test_an_upper_loss_that_is_constant_in_the_weights_is_none(caplog: pytest.LogCaptureFixture) -> None:
    class Constant(Computed):
        def upper_loss(self, model: Any, hyperparameters: Hyperparameters, batch: Any) -> Tensor:  # type: ignore[override]
            found: Tensor = hyperparameters["last"].square() + 0 * super().upper_loss(model, batch)
            return found

    assert check_problem(Constant(), SPACE).smooth == (True, True)
    assert "while its gradient is 0" not in caplog.text


@pytest.mark.parametrize("use", [lambda last: last + 3 * last.item(), lambda last: last + 3 * last.detach()])
def test_a_use_of_a_hyperparameter_that_gradients_do_not_see(use: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert check_problem(Computed(use=use), SPACE).smooth == (True, False)
    assert "last: Computed.lower_loss changes with it by 4 of what its gradient says" in caplog.text


def test_one_of_many_hyperparameters_that_gradients_do_not_see_whole(caplog: pytest.LogCaptureFixture) -> None:
    class Many(Network):
        def lower_loss(self, model: Any, hyperparameters: Hyperparameters, batch: Any) -> Tensor:
            x = torch.stack([hyperparameters["x"][str(i)] for i in range(40)])
            hidden = 2 * hyperparameters["x"]["7"].item()
            return self.upper_loss(model, batch) + (x.sum() + hidden) * model[-1].weight.square().sum()

    space = Space(tuple(Parameter(("x", str(i)), 1e-4, 1.0, log=True) for i in range(40)))
    assert [p.name for p in check_problem(Many(), space).parameters if not p.smooth] == ["x/7"]
    assert "x/7: Many.lower_loss changes with it by 3 of what its gradient says" in caplog.text


def test_a_module_as_upper_level_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    class Rounded(ManyParabolas):
        def upper_loss(self, model: Any, batch: Any) -> Tensor:
            return (straight_through(model.weight[0], 3) - 1).square().mean()

    check_upper_variables(ManyParabolas(3), {})
    assert WRONG not in caplog.text
    check_upper_variables(Rounded(3), {})
    assert "Rounded.upper_loss changes with the weights by" in caplog.text


@pytest.mark.parametrize(
    ("value", "slope", "rounding", "share"),
    [
        (lambda t: 2 * t, 2.0, 1e-16, None),
        (lambda t: t, 2.0, 1e-16, 0.5),
        (lambda t: 0.0, 2.0, 1e-16, 0.0),
        (lambda t: 0.0, 0.0, 1e-16, None),
        (lambda t: float("nan"), 2.0, 1e-16, None),
        (lambda t: 0.0, 2.0, 1e-3, None),  # too coarse to tell
        (lambda t: 2e-16 * round(1e16 * t), 2.0, 1e-30, None),  # moved by less than the weights resolve
        (lambda t: 1e-12 * round(2e12 * t), 2.0, 1e-16, None),  # coarser than it says, and right over longer lengths
    ],
)
def test_a_slope_against_values(value: Any, slope: float, rounding: float, share: float | None) -> None:
    found = contradicted(value, slope, rounding, resolution=1e-16, longest=0.02)
    assert found == (share if share is None else pytest.approx(share))
