"""What is refused before anything is trained: one broken problem for each error."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raybilevel.errors import ConfigError, NotFiniteError, ProblemError
from raybilevel.methods import Default, HypergradientDescent, Paper
from raybilevel.problem import BilevelProblem, Hyperparameters, Level
from raybilevel.search import check_problem
from raybilevel.search._checks import check_search, check_upper_variables
from raybilevel.space import STARTS, Parameter, Space
from tests.problems_for_tests import Network, Ridge
from tests.tiny_problems import ManyParabolas


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
def test_a_hyperparameter_that_the_lower_loss_does_not_follow_is_searched_by_values(use: Callable[[Tensor], Any]):
    class Deaf(Ridge):
        def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Any) -> Tensor:
            return super().lower_loss(model, hyperparameters, batch) + use(hyperparameters["extra"])

    space = Space((*Ridge().space.parameters, Parameter(("extra",), 0.0, 1.0)))
    found = check_problem(Deaf(), space)
    assert found.smooth == (*(True for _ in Ridge().space.parameters), False) and found.names == space.names


def test_constants_reach_the_loss():
    class WithConstants(Ridge):
        def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Any) -> Tensor:
            assert hyperparameters["kind"] == "a" and isinstance(hyperparameters["decay"]["shift"], Tensor)
            return super().lower_loss(model, hyperparameters, batch)

    check_problem(WithConstants(), Ridge().space, {"kind": "a", "decay": {"shift": 0.5}})


def test_every_abstract_part_is_asked_for():
    assert BilevelProblem.__abstractmethods__ == {"model", "lower_loss", "upper_loss", "batches"}


# Where x is a module.


def test_a_large_upper_level_is_tried_before_a_descent():
    check_upper_variables(ManyParabolas(3), {})
    with pytest.raises(ProblemError, match="no hyperparameter to search"):
        check_upper_variables(Network(), {})

    class Idle(ManyParabolas):
        def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Any) -> Tensor:
            return model.get_parameter("weight").square().sum()

    with pytest.raises(ProblemError, match="depends on"):
        check_upper_variables(Idle(3), {})


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_large_upper_level_with_a_loss_that_is_not_finite(value: float):
    class Infinite(ManyParabolas):
        def upper_loss(self, model: nn.Module, batch: Any) -> Tensor:
            return super().upper_loss(model, batch) * value

    with pytest.raises(NotFiniteError, match=f"upper_loss is {value}"):
        check_upper_variables(Infinite(3), {})


# What a method refuses.


@pytest.mark.parametrize("method", [Default(), Paper()])
def test_a_method_for_hyperparameters_refuses_a_module(method: Default | Paper):
    check_search(Ridge(), Ridge().space, {}, method)
    with pytest.raises(ConfigError, match=r"searches hyperparameters.*method='hypergradient'"):
        check_search(ManyParabolas(3), STARTS, {}, method)


def test_a_descent_takes_a_box_and_a_module_and_no_shards_that_are_not_there():
    check_search(Ridge(), Ridge().space, {}, HypergradientDescent())
    check_search(ManyParabolas(3), STARTS, {}, HypergradientDescent())
    with pytest.raises(ProblemError, match="a search space's descents see all data"):
        check_search(Ridge(), Ridge().space, {}, HypergradientDescent(shards=2))
    with pytest.raises(ProblemError, match="has no shard"):
        check_search(ManyParabolas(3), STARTS, {}, HypergradientDescent(shards=2))
