from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from raybilevel._lower.levels import Levels, check_problem
from raybilevel._lower.training import LowerLevelTraining
from raybilevel._lower.variables import ConfigVariables
from raybilevel.errors import NotFiniteError, ProblemError
from raybilevel.problem import BilevelProblem, Hyperparameters, Level
from raybilevel.space import Parameter, Space
from tests.problems_for_tests import Network, Ridge, levels_at, vector

X = vector(0.1, 2.0, 0.5)
ROUNDING = 1e-13  # sums of at most 30 terms of order one


def levels_of(problem: Ridge) -> tuple[Levels, Tensor, Tensor]:
    """The problem's levels, its decays x, and some weights y."""
    model = problem.model().to(problem.dtype)
    with torch.no_grad():
        model.get_parameter("weight").copy_(vector(0.3, -1.0, 2.0))
    return levels_at(problem, model, problem.config(X))


def danskin(problem: Ridge, config: dict[str, Any]) -> dict[str, Any]:
    """df/dx at the same weights."""
    training = LowerLevelTraining(problem, config)
    with torch.no_grad():
        training.model.get_parameter("weight").copy_(vector(0.3, -1.0, 2.0))
    return training.gradient()


@pytest.mark.parametrize("batch", [None, 5, 7])  # 12 rows below and 30 above: no size divides both
def test_means_are_weighted_by_the_size_of_the_batch(batch: int | None):
    problem = Ridge(batch=batch)
    levels, x, y = levels_of(problem)
    assert levels.value("lower", x, y) == pytest.approx(problem.f(X, y).item(), rel=ROUNDING)
    assert levels.value("upper", x, y) == pytest.approx(problem.F(y).item(), rel=ROUNDING)
    assert levels.loss_at("lower", x, y).item() == pytest.approx(problem.f(X, y).item(), rel=ROUNDING)


@pytest.mark.parametrize("batch", [None, 5])
def test_gradients_against_the_dense_formulas(batch: int | None):
    problem = Ridge(batch=batch)
    levels, x, y = levels_of(problem)
    above, below = levels.upper(x, y), levels.lower(x, y)
    inputs, targets = problem.upper
    assert above.value == pytest.approx(problem.F(y).item(), rel=ROUNDING)
    assert above.in_y.tolist() == pytest.approx((inputs.T @ (inputs @ y - targets) / 30).tolist(), rel=1e-12)
    inner = problem.hessian(X) @ (y - problem.solution(X))
    assert below.in_y.tolist() == pytest.approx(inner.tolist(), rel=1e-12)
    # f has the term x_j y_j^2 / 2
    assert below.in_x.tolist() == pytest.approx([0.3**2 / 2, 0.5, 2.0], rel=ROUNDING)


def test_other_weights_than_the_models_are_as_good_and_leave_it_alone():
    problem = Ridge(batch=5)
    levels, x, y = levels_of(problem)
    assert levels.value("lower", x, y + 1) == pytest.approx(problem.f(X, y + 1).item(), rel=ROUNDING)
    assert torch.equal(levels.y, y)


def test_a_level_that_does_not_depend_on_x_has_gradient_zero_in_it():
    levels, x, y = levels_of(Ridge())
    assert levels.upper(x, y).in_x.tolist() == [0.0, 0.0, 0.0]


def test_every_float_of_the_config_has_an_entry_in_the_gradient():
    problem = Ridge(batch=5)
    gradient = danskin(problem, {**problem.config(X), "layers": 3, "name": "a", "unused": 1.0})
    assert list(gradient["decay"].values()) == pytest.approx([0.3**2 / 2, 0.5, 2.0], rel=ROUNDING)
    assert gradient["unused"] == 0.0
    assert set(gradient) == {"decay", "unused"}


def test_a_gradient_that_is_not_finite_is_named():
    class Root(Ridge):
        def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Any) -> Tensor:
            return super().lower_loss(model, hyperparameters, batch) + hyperparameters["root"].sqrt()

    problem = Root()
    with pytest.raises(NotFiniteError, match="root is inf"):
        danskin(problem, {**problem.config(X), "root": 0.0})


@pytest.mark.parametrize("batch", [None, 5])
def test_gradients_are_charged_and_values_are_not(batch: int | None):
    levels, x, y = levels_of(Ridge(batch=batch))
    levels.value("lower", x, y)
    assert levels.passes == 0
    levels.lower(x, y)
    assert levels.passes == 1
    levels.upper(x, y)
    assert levels.passes == 1 + 30 / 12


def test_levels_are_taken_in_eval_mode():
    problem = Network()
    model = problem.model()
    model.train()
    levels, x, y = levels_at(problem, model, {"decay": 0.1})
    assert levels.value("upper", x, y) == levels.value("upper", x, y)  # dropout would differ
    assert not model.training


class Checkpointed(Network):
    """Activations are not kept, but made again when the loss is differentiated."""

    def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Any) -> Tensor:
        plain = super().lower_loss
        return checkpoint(lambda *given: plain(model, hyperparameters, given), *batch, use_reentrant=False)


def test_what_is_computed_again_is_computed_at_the_same_weights():
    found = []
    for problem in (Network(), Checkpointed()):
        torch.manual_seed(0)
        levels, x, y = levels_at(problem, problem.model(), {"decay": 0.1})
        found.append(levels.lower(x, y + 0.5).in_y)
    assert torch.equal(*found)


@pytest.mark.parametrize("level", ["lower", "upper"])
def test_a_loss_that_is_not_finite_is_an_error(level: str):
    class Infinite(Ridge):
        def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Any) -> Tensor:
            return super().lower_loss(model, hyperparameters, batch) * (math.inf if level == "lower" else 1)

        def upper_loss(self, model: nn.Module, batch: Any) -> Tensor:
            return super().upper_loss(model, batch) * math.inf

    problem = Infinite()
    training = LowerLevelTraining(problem, problem.config(X))
    with pytest.raises(NotFiniteError, match=f"{level}-level loss is inf"):
        training.losses()


def test_floats_become_tensors_and_the_rest_stays():
    problem = Ridge(dtype=torch.float32)
    variables = ConfigVariables({"a": {"b": 0.5}, "layers": 3, "name": "x", "on": True}, problem)
    given = variables.given(variables.x)
    assert variables.x.dtype == given["a"]["b"].dtype == torch.float32 and given["a"]["b"].shape == ()
    assert {name: given[name] for name in ("layers", "name", "on")} == {"layers": 3, "name": "x", "on": True}


# check_problem: one broken problem for each error.


class Broken(Ridge):
    """A ridge in which single parts can be replaced."""

    def __init__(self, **parts: Callable[..., Any]) -> None:
        super().__init__()
        self.parts = parts

    def model(self) -> Any:
        return self.parts["model"]() if "model" in self.parts else super().model()

    def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Any) -> Any:
        loss = super().lower_loss(model, hyperparameters, batch)
        return self.parts["lower"](loss) if "lower" in self.parts else loss

    def upper_loss(self, model: nn.Module, batch: Any) -> Any:
        loss = super().upper_loss(model, batch)
        return self.parts["upper"](loss) if "upper" in self.parts else loss

    def batches(self, level: Level, generator: torch.Generator | None) -> Iterable[Any]:
        return self.parts[f"{level}_batches"]() if f"{level}_batches" in self.parts else super().batches(level, None)


def test_a_sound_problem_passes_and_leaves_the_random_numbers_alone():
    before = torch.get_rng_state()
    check_problem(Broken(), Ridge().space)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("level", ["lower", "upper"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda loss: loss.expand(2), r"must return a tensor of shape \(\), got \(2,\)"),
        (lambda loss: loss.item(), r"must return a tensor of shape \(\), got float"),
        (lambda loss: loss.detach(), "does not depend on the model's parameters"),
    ],
)
def test_a_loss_that_cannot_be_differentiated(level: str, change: Callable[[Tensor], Any], message: str):
    with pytest.raises(ProblemError, match=f"{level}_loss {message}"):
        check_problem(Broken(**{level: change}), Ridge().space)


@pytest.mark.parametrize("level", ["lower", "upper"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite(level: str, value: float):
    with pytest.raises(NotFiniteError, match=f"{level}_loss is {value}"):
        check_problem(Broken(**{level: lambda loss: loss * value}), Ridge().space)


@pytest.mark.parametrize("level", ["lower", "upper"])
@pytest.mark.parametrize("batches", [list, lambda: ["text"]])
def test_a_level_without_data(level: str, batches: Callable[[], Any]):
    with pytest.raises(ProblemError, match=f"batches\\('{level}', None\\) yields no tensors"):
        check_problem(Broken(**{f"{level}_batches": batches}), Ridge().space)


@pytest.mark.parametrize(
    ("model", "message"), [(nn.ReLU, "no parameters to train"), (lambda: "model", "must return a torch.nn.Module")]
)
def test_a_model_that_cannot_be_trained(model: Callable[[], Any], message: str):
    with pytest.raises(ProblemError, match=message):
        check_problem(Broken(model=model), Ridge().space)


def test_frozen_parameters_are_no_parameters_to_train():
    with pytest.raises(ProblemError, match="no parameters to train"):
        check_problem(Broken(model=lambda: Ridge().model().requires_grad_(False)), Ridge().space)


@pytest.mark.parametrize("setting", ["epochs", "evaluate_every"])
@pytest.mark.parametrize("number", [0, -1, 2.5, None])
def test_epochs_are_a_whole_number(setting: str, number: Any):
    problem = Ridge()
    setattr(problem, setting, number)
    with pytest.raises(ProblemError, match=f"{setting} must be a whole number"):
        check_problem(problem, problem.space)


@pytest.mark.parametrize("use", [lambda value: 0.0, lambda value: value.item(), lambda value: value.detach()])
def test_a_hyperparameter_that_the_lower_loss_does_not_follow_is_named(use: Callable[[Tensor], Any]):
    class Deaf(Ridge):
        def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Any) -> Tensor:
            return super().lower_loss(model, hyperparameters, batch) + use(hyperparameters["extra"])

    space = Space((*Ridge().space.parameters, Parameter(("extra",), 0.0, 1.0)))
    with pytest.raises(ProblemError, match=r"extra: Deaf\.lower_loss does not depend on it"):
        check_problem(Deaf(), space)


def test_constants_reach_the_loss():
    class WithConstants(Ridge):
        def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Any) -> Tensor:
            assert hyperparameters["kind"] == "a" and isinstance(hyperparameters["decay"]["shift"], Tensor)
            return super().lower_loss(model, hyperparameters, batch)

    check_problem(WithConstants(), Ridge().space, {"kind": "a", "decay": {"shift": 0.5}})


def test_batches_that_are_all_empty_are_found_before_anything_is_divided():
    class Empty(Broken):
        def batch_size(self, batch: Any) -> int:
            return 0

    problem = Empty()
    with pytest.raises(ProblemError, match="yields no examples"):
        LowerLevelTraining(problem, problem.config(X)).losses()


def test_every_abstract_part_is_asked_for():
    assert BilevelProblem.__abstractmethods__ == {"model", "lower_loss", "upper_loss", "batches"}
