from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raybilevel._lower.levels import Levels, as_tensors, lower_gradient
from raybilevel.errors import NotFiniteError, ProblemError
from raybilevel.problem import Hyperparameters
from tests.problems_for_tests import Network, Ridge, vector

X = vector(0.1, 2.0, 0.5)
ROUNDING = 1e-13  # sums of at most 30 terms of order one


def levels_of(problem: Ridge) -> tuple[Levels, Tensor]:
    """The problem at some weights, and these."""
    model = problem.model().to(problem.dtype)
    weights = model.get_parameter("weight")
    with torch.no_grad():
        weights.copy_(vector(0.3, -1.0, 2.0))
    return Levels(problem, model), weights


@pytest.mark.parametrize("batch", [None, 5, 7])  # 12 rows below and 30 above: no size divides both
def test_means_are_weighted_by_the_size_of_the_batch(batch: int | None):
    problem = Ridge(batch=batch)
    levels, weights = levels_of(problem)
    y = weights.detach()[0]
    hyperparameters = as_tensors(problem.config(X), problem)
    assert levels.value("lower", hyperparameters) == pytest.approx(problem.f(X, y).item(), rel=ROUNDING)
    assert levels.value("upper", {}) == pytest.approx(problem.F(y).item(), rel=ROUNDING)


@pytest.mark.parametrize("batch", [None, 5])
def test_gradients_against_the_dense_formulas(batch: int | None):
    problem = Ridge(batch=batch)
    levels, weights = levels_of(problem)
    y = weights.detach()[0]
    above = levels.gradient("upper", {}, [weights])
    below = levels.gradient("lower", as_tensors(problem.config(X), problem), [weights])
    inputs, targets = problem.upper
    assert above.value == pytest.approx(problem.F(y).item(), rel=ROUNDING)
    assert above.gradient[0][0].tolist() == pytest.approx((inputs.T @ (inputs @ y - targets) / 30).tolist(), rel=1e-12)
    inner = problem.hessian(X) @ (y - problem.solution(X))
    assert below.gradient[0][0].tolist() == pytest.approx(inner.tolist(), rel=1e-12)


def test_a_level_that_does_not_depend_on_something_has_gradient_zero_in_it():
    levels, weights = levels_of(Ridge())
    other = torch.ones(2, dtype=torch.double, requires_grad=True)
    assert levels.gradient("upper", {}, [weights, other]).gradient[1].tolist() == [0.0, 0.0]


def test_the_gradient_in_x_is_half_the_square_of_the_weights():
    # f has the term x_j y_j^2 / 2
    problem = Ridge(batch=5)
    gradient = lower_gradient(levels_of(problem)[0], {**problem.config(X), "layers": 3, "name": "a", "unused": 1.0})
    assert list(gradient["decay"].values()) == pytest.approx([0.3**2 / 2, 0.5, 2.0], rel=ROUNDING)
    assert gradient["unused"] == 0.0
    assert set(gradient) == {"decay", "unused"}


def test_a_gradient_that_is_not_finite_is_named():
    class Root(Ridge):
        def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Any) -> Tensor:
            return super().lower_loss(model, hyperparameters, batch) + hyperparameters["root"].sqrt()

    problem = Root()
    with pytest.raises(NotFiniteError, match="root is inf"):
        lower_gradient(levels_of(problem)[0], {**problem.config(X), "root": 0.0})


def test_gradients_are_charged_and_values_are_not():
    problem = Ridge(batch=5)
    levels, weights = levels_of(problem)
    hyperparameters = as_tensors(problem.config(X), problem)
    levels.value("lower", hyperparameters)
    assert levels.passes == 0
    levels.gradient("lower", hyperparameters, [weights])
    assert levels.passes == 1
    levels.gradient("upper", {}, [weights])
    assert levels.passes == 1 + 30 / 12


def test_levels_are_taken_in_eval_mode():
    problem = Network()
    model = problem.model()
    model.train()
    levels = Levels(problem, model)
    assert levels.value("upper", {}) == levels.value("upper", {})  # dropout would differ
    assert not model.training


def test_a_level_that_is_not_finite_is_an_error():
    levels, weights = levels_of(Ridge())
    with torch.no_grad():
        weights.fill_(math.inf)
    with pytest.raises(NotFiniteError, match="upper-level loss is"):
        levels.value("upper", {})


def test_floats_become_tensors_and_the_rest_stays():
    problem = Ridge(dtype=torch.float32)
    tensors = as_tensors({"a": {"b": 0.5}, "layers": 3, "name": "x", "on": True}, problem, requires_grad=True)
    assert tensors["a"]["b"].dtype == torch.float32 and tensors["a"]["b"].requires_grad
    assert {name: tensors[name] for name in ("layers", "name", "on")} == {"layers": 3, "name": "x", "on": True}


def test_batches_that_are_all_empty_are_found_before_anything_is_divided():
    class Empty(Ridge):
        def batch_size(self, batch: Any) -> int:
            return 0

    with pytest.raises(ProblemError, match="yields no examples"):
        Levels(Empty(), Ridge().model())
