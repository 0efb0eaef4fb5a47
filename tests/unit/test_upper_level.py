from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raybilevel._descents.fixed_x import LagrangianPoint, RejectedDescentError, descend, lagrangian_point, limit
from raybilevel._descents.joint import joint_descent
from raybilevel._descents.trained_point import TrainedPoint
from raybilevel._lower.levels import Levels
from raybilevel._lower.linearisation import inner
from raybilevel._lower.variables import BoxVariables
from raybilevel.errors import NotFiniteError
from raybilevel.problem import Hyperparameters
from tests.problems_for_tests import Formula, Logistic, Network, Ridge, point_at, trained_point, vector

UNIT = vector(0.4, 0.6, 0.5)
LINE_SEARCH = 25  # evaluations that one line search of torch's L-BFGS may take


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05)


def unfinished(kind: type[Ridge] = Logistic) -> TrainedPoint:
    """A point three steps into its training."""
    return trained_point(kind(rows=20, batch=8, epochs=1, optimizer=sgd), UNIT)


def implicit(problem: Ridge, y: Tensor, unit: Tensor) -> Tensor:
    """-(d2f/dx dy) (d2f/dy2)^-1 dF/dy with a dense Hessian, in the unit cube."""
    x = problem.values(unit)
    hessian = torch.autograd.functional.hessian(lambda y: problem.f(x, y), y)
    solved = torch.linalg.solve(hessian, torch.autograd.functional.jacobian(problem.F, y))
    tracked, weights = unit.clone().requires_grad_(True), y.clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(problem.f(problem.values(tracked), weights), weights, create_graph=True)
    return -torch.autograd.grad(slope @ solved, tracked)[0]


# The tilt.


def test_the_tilted_gradient_is_exactly_zero_at_an_unfinished_training():
    point = unfinished()
    assert inner(point.tilt, point.tilt) > 1e-4  # the training is far from its end
    here = point.evaluate(UNIT, point.still)
    assert not here.lower.in_y.any() and not point.here.lower.in_y.any()
    assert here.lower.value == point.here.lower.value


def test_the_tilt_is_a_linear_function_of_the_displacement():
    point = unfinished()
    move = torch.full_like(point.y, 0.1)
    problem, y = Logistic(rows=20), point.y
    x = problem.values(UNIT)
    expected = problem.f(x, y + 0.1) - 0.1 * torch.autograd.functional.jacobian(lambda y: problem.f(x, y), y).sum()
    assert point.evaluate(UNIT, move).lower.value == pytest.approx(expected.item(), rel=1e-13)


def test_an_evaluation_against_the_formulas():
    point, other = unfinished(), vector(0.2, 0.9, 0.3)
    move = torch.full_like(point.y, -0.2)
    found = point.evaluate(other, move)
    problem, y = Logistic(rows=20), point.y - 0.2
    assert found.upper.value == pytest.approx(problem.F(y).item(), rel=1e-13)
    in_y = torch.autograd.functional.jacobian(lambda y: problem.f(problem.values(other), y), y) - point.tilt
    in_x = torch.autograd.functional.jacobian(lambda unit: problem.f(problem.values(unit), y), other)
    assert found.lower.in_y.tolist() == pytest.approx(in_y.tolist(), abs=1e-14)
    assert found.lower.in_x.tolist() == pytest.approx(in_x.tolist(), rel=1e-12)


def test_constants_reach_both_levels():
    class Shifted(Ridge):
        def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Any) -> Tensor:
            return super().lower_loss(model, hyperparameters, batch) + hyperparameters["decay"]["shift"]

    problem = Shifted()
    model = problem.model().double()
    variables = [BoxVariables(problem.space, {"decay": {"shift": shift}}) for shift in (0.0, 2.5)]
    values = [TrainedPoint(Levels(problem, model, v), UNIT).here.lower.value for v in variables]
    assert values[1] - values[0] == pytest.approx(2.5, rel=1e-12)


def test_what_an_evaluation_costs():
    point = unfinished()
    assert point.evaluation_passes == 1 + 30 / 20
    before = point.levels.passes
    point.evaluate(UNIT, point.still)
    assert point.levels.passes - before == point.evaluation_passes


def test_float32_and_frozen_parameters():
    torch.manual_seed(0)
    problem = Network()
    problem.space = Logistic(dimension=1).space
    model = problem.model()
    model[0].requires_grad_(False)
    frozen = model[0].weight.detach().clone()

    class Nested(Network):
        def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Any) -> Tensor:
            return super().lower_loss(model, {"decay": hyperparameters["decay"]["0"]}, batch)

    variables = BoxVariables(Logistic(dimension=1).space, {})
    point = TrainedPoint(Levels(Nested(), model, variables), vector(0.5))
    found = lagrangian_point(point, 0.05, 60)
    assert math.isfinite(found.gradient.item()) and found.gradient.dtype == torch.double
    assert torch.equal(model[0].weight, frozen)


# Hypergradients.


@pytest.mark.parametrize("kind", [Ridge, Logistic])
def test_the_error_of_a_descent_falls_like_one_over_the_multiplier(kind: type[Ridge]):
    problem = kind(rows=20)
    point = trained_point(problem, UNIT)
    exact = implicit(problem, point.y, UNIT)
    errors, multipliers = [], []
    for decrease in (0.1, 0.03, 0.01, 0.003):
        found = descend(point, decrease, max_passes=1000, tolerance=1e-7)
        errors.append((found.gradient - exact).norm().item())
        multipliers.append(found.multiplier)
    products = [error * multiplier for error, multiplier in zip(errors, multipliers, strict=True)]
    assert products == pytest.approx([products[-1]] * 4, rel=0.05)  # the next term is smaller by 1/m, m > 30
    assert errors[-1] < 2e-3 * exact.norm().item()


def test_the_hypergradient_is_that_of_the_reduced_problem():
    problem = Ridge(rows=20)
    found = lagrangian_point(trained_point(problem, UNIT), 0.05, max_passes=1000, tolerance=1e-7)
    reduced = torch.autograd.functional.jacobian(problem.reduced, UNIT)
    assert found.gradient.tolist() == pytest.approx(reduced.tolist(), abs=1e-6 * reduced.norm().item())


class Priced(Logistic):
    """F has a price on the decays themselves, which does not depend on the weights."""

    price = 0.1

    def upper_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Any) -> Tensor:  # type: ignore[override]
        return super().upper_loss(model, batch) + self.price * self.decay(hyperparameters).sum()

    def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Any) -> Tensor:
        weights = model.get_parameter("weight")[0]
        return super().upper_loss(model, batch) + (self.decay(hyperparameters) * weights.square()).sum() / 2


@pytest.mark.parametrize("estimate", [lagrangian_point, descend])
def test_a_part_of_the_upper_level_that_is_of_x_alone_is_in_the_hypergradient(
    estimate: Callable[..., LagrangianPoint],
):
    point = trained_point(Priced(rows=20), UNIT)
    exact = implicit(Logistic(rows=20), point.y, UNIT)
    price = torch.autograd.functional.jacobian(lambda unit: 0.1 * Logistic().values(unit).sum(), UNIT)
    found = estimate(point, 1e-3, max_passes=1000, tolerance=1e-7).gradient
    assert (found - exact - price).norm() < 1e-2 * exact.norm() < 0.1 * price.norm()


def test_an_unfinished_training_has_the_hypergradient_of_the_tilted_problem():
    problem, point = Logistic(rows=20), unfinished()
    exact = implicit(problem, point.y, UNIT)  # a linear term has no second derivative
    for estimate in (lagrangian_point, descend):
        found = estimate(point, 1e-3, max_passes=1000, tolerance=1e-7)
        assert (found.gradient - exact).norm() < 1e-2 * exact.norm()


def test_few_passes_at_the_settings_of_the_search_give_the_lagrangian_point():
    problem = Logistic(rows=20)
    point = trained_point(problem, UNIT)
    before = point.levels.passes
    found = lagrangian_point(point, 0.05, max_passes=30)
    exact = implicit(problem, point.y, UNIT)
    assert (found.gradient - exact).norm() < 0.05 * exact.norm()
    assert point.levels.passes - before <= 10


def test_the_augmented_lagrangian_point_of_the_linear_system_is_that_of_the_descent():
    point = trained_point(Logistic(rows=20), UNIT)
    limit = lagrangian_point(point, 1e-3, 1000, tolerance=1e-6)
    descent = descend(point, 1e-3, 1000, tolerance=1e-6)
    at_its_decrease = lagrangian_point(point, descent.decrease, 1000, tolerance=1e-6)
    assert limit.first is None
    assert descent.first is not None
    assert at_its_decrease.multiplier == pytest.approx(descent.multiplier, rel=2e-3)
    assert at_its_decrease.slack == pytest.approx(descent.slack, rel=5e-3)
    moved = at_its_decrease.displacement - descent.displacement
    assert inner(moved, moved) < 1e-4 * inner(descent.displacement, descent.displacement)


def test_flat_directions_of_f_are_left_alone():
    # f pins y_0 to x and nothing pins y_1, so a training answers to x in y_0 only: dF/dx = y_0 - 3
    problem = Formula(1, 2, lambda x, y: (y[0] - x[0]).square(), lambda y: (y[0] - 3) ** 2 / 2 + (y[1] - 5) ** 2)
    point = trained_point(problem, vector(0.25))
    found = lagrangian_point(point, 0.05, 100)
    assert found.gradient.item() == pytest.approx(0.25 - 3, rel=1e-6)


def test_a_lower_level_that_is_not_convex_is_descended():
    point = beside_a_maximum(0.575, lambda y: y[0] - y[1])  # F pulls y_1 to where f is convex
    assert limit(point, 0.05, 100, 0.01) is None
    found = lagrangian_point(point, 0.05, 100)
    assert found.first is not None and found.slack > 0
    assert math.isfinite(found.gradient.item())


def test_a_descent_that_falls_below_the_training_is_rejected():
    # Near its maximum f falls on either side: no m holds y_1 there, and F + m f is no answer to x.
    point = beside_a_maximum(0.1, lambda y: y[0] + y[1])
    with pytest.raises(RejectedDescentError, match=r"lowered f by 0\.000668 below the training's"):
        lagrangian_point(point, 0.05, 100)


def beside_a_maximum(y1: float, upper: Callable[[Tensor], Tensor]) -> TrainedPoint:
    """f has a maximum at y_1 = 0, and is not convex below 1 / sqrt(3)."""
    problem = Formula(1, 2, lambda x, y: (y[0] - x[0]).square() + (y[1].square() - 1).square() / 4, upper)
    model = problem.model().double()
    with torch.no_grad():
        model.get_parameter("weight").copy_(torch.tensor([[0.4, y1]]))
    return point_at(problem, model, vector(0.4))


@pytest.mark.parametrize(
    ("f", "upper", "message"),
    [
        (lambda x, y: (y[0] - x[0]).square(), lambda y: y[0].square().sqrt(), "upper-level loss is 0, but .* weights"),
        (lambda x, y: y[0].square().sqrt(), lambda y: y[0].square(), "lower-level loss is 0, but .* in the weights"),
    ],
)
def test_a_gradient_that_is_not_finite_names_its_level(f: Any, upper: Any, message: str):
    problem = Formula(1, 1, f, upper)
    model = problem.model().double()
    nn.init.zeros_(model.get_parameter("weight"))
    with pytest.raises(NotFiniteError, match=message):
        point_at(problem, model, vector(0.0))


@pytest.mark.parametrize("max_passes", [4.0, 7.0, 12.0])
def test_a_linear_system_keeps_to_its_passes(max_passes: float):
    point = trained_point(Logistic(rows=20, dimension=6), torch.full((6,), 0.4).double())
    before = point.levels.passes
    assert lagrangian_point(point, 0.05, max_passes, tolerance=1e-12).first is None
    assert point.levels.passes - before <= max_passes


@pytest.mark.parametrize("decrease", [0.3, 0.03])
@pytest.mark.parametrize("first", [0.01, 10.0])
def test_where_a_descent_ends(decrease: float, first: float):
    problem = Logistic(rows=20)
    point = trained_point(problem, UNIT)
    found = descend(point, decrease, max_passes=1000, first=first, tolerance=1e-6)
    y = point.y + found.displacement
    assert 0 < found.decrease <= 1.5 * decrease
    assert found.decrease == pytest.approx(
        (point.here.upper.value - problem.F(y).item()) / point.here.upper.value, rel=1e-12
    )
    rise = problem.f(problem.values(UNIT), y).item() - point.here.lower.value
    assert found.slack == pytest.approx(rise, abs=1e-9)  # the training ends at a gradient of 1e-10: no tilt
    gradient = torch.autograd.functional.jacobian(
        lambda y: problem.F(y) + found.multiplier * problem.f(problem.values(UNIT), y), y
    )
    assert gradient.abs().max() < 1e-5 * point.here.upper.in_y.abs().max()  # y_m minimises F + m f


def test_the_multiplier_is_told_relative_to_its_cauchy_estimate():
    point = trained_point(Logistic(rows=20), UNIT)
    found = descend(point, 0.05, 1000, first=0.01, tolerance=1e-6)
    again = descend(point, 0.05, 1000, first=found.first, tolerance=1e-6)
    assert found.first > 0.01  # it was raised
    assert again.multiplier == pytest.approx(found.multiplier, rel=1e-12)
    assert again.decrease == pytest.approx(found.decrease, rel=1e-3)


class Scaled(Logistic):
    """The same problem with F, f and the weights in other units."""

    def __init__(self, upper: float, lower: float, weights: float) -> None:
        super().__init__(rows=20)
        self.units = upper, lower, weights

    def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Any) -> Tensor:
        y = self.units[2] * model.get_parameter("weight")[0]
        penalty = (self.decay(hyperparameters) * y.square()).sum() / 2
        return self.units[1] * (self.data_loss(y, batch) + penalty)

    def upper_loss(self, model: nn.Module, batch: Any) -> Tensor:
        return self.units[0] * self.data_loss(self.units[2] * model.get_parameter("weight")[0], batch)

    @staticmethod
    def data_loss(y: Tensor, batch: Any) -> Tensor:
        return nn.functional.softplus(-batch[1].sign() * (batch[0] @ y)).mean()


Estimate = Callable[..., LagrangianPoint]


def in_units(
    estimate: Estimate, units: tuple[float, float, float], max_passes: float, tolerance: float
) -> tuple[LagrangianPoint, float]:
    """The hypergradient in these units and what it cost; its multiplier begins too small."""
    problem, y = Scaled(*units), trained_point(Logistic(rows=20), UNIT).y
    model = problem.model().double()
    with torch.no_grad():
        model.get_parameter("weight").copy_(y / units[2])
    point = point_at(problem, model, UNIT)
    before = point.levels.passes
    found = estimate(point, 0.05, max_passes, 0.1, tolerance)
    return found, point.levels.passes - before


@pytest.mark.parametrize(
    "units", [(1000, 1, 1), (1, 7, 1), (1, 1, 3), (1000, 7, 3), (1e-6, 1e6, 1), (1, 1, 1e3), (1, 1, 1e-3)]
)
@pytest.mark.parametrize("estimate", [lagrangian_point, descend])
def test_units_do_not_matter(estimate: Estimate, units: tuple[float, float, float]):
    (plain, _), (scaled, _) = (in_units(estimate, u, 200, 1e-6) for u in ((1, 1, 1), units))
    agreement = 1e-5  # both descents go down to 1e-6 of their first gradient, on ways that rounding parts
    assert (scaled.gradient / units[0] - plain.gradient).norm() < agreement * plain.gradient.norm()
    assert scaled.multiplier * units[1] / units[0] == pytest.approx(plain.multiplier, rel=agreement)
    assert scaled.decrease == pytest.approx(plain.decrease, rel=agreement)
    assert scaled.slack / units[1] == pytest.approx(plain.slack, rel=2 * agreement)  # of second order


@pytest.mark.parametrize("power", [-14, 14])
@pytest.mark.parametrize("level", ["upper", "lower", "weights"])
@pytest.mark.parametrize("estimate", [lagrangian_point, descend])
def test_units_do_not_change_the_way(estimate: Estimate, level: str, power: int):
    # a power of two scales without rounding: step by step the same descent, even where it is cut short
    units = tuple(2.0**power if name == level else 1.0 for name in ("upper", "lower", "weights"))
    (plain, passes), (scaled, scaled_passes) = (in_units(estimate, u, 30, 0.05) for u in ((1.0, 1.0, 1.0), units))
    assert scaled_passes == passes
    # the difference that estimates the curvature is not of the same length in all units of the weights
    agreement = 1e-4 if level == "weights" else 1e-12
    assert (scaled.gradient / units[0] - plain.gradient).norm() <= agreement * plain.gradient.norm()


def constant(kind: type[Ridge]) -> type[Ridge]:
    class Constant(kind):
        def upper_loss(self, model: nn.Module, batch: Any) -> Tensor:
            return 3.0 + 0.0 * model.get_parameter("weight").sum()

    return Constant


@pytest.mark.parametrize("estimate", [lagrangian_point, descend])
def test_nothing_moves_if_the_upper_level_is_constant(estimate: Estimate):
    point = unfinished(constant(Logistic))
    found = estimate(point, 0.05, 100)
    assert found.gradient.tolist() == [0.0, 0.0, 0.0]
    assert inner(found.displacement, found.displacement) == 0
    assert (found.multiplier, found.decrease, found.slack) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("max_passes", [1.0, 20.0, 40.0])
@pytest.mark.parametrize("decrease", [0.3, 1e-4])
def test_a_descent_keeps_to_its_passes_but_for_a_line_search(max_passes: float, decrease: float):
    point = unfinished()
    before = point.levels.passes
    descend(point, decrease, max_passes, first=1e-3, tolerance=1e-9)
    # beside the line search: the curvature, the three evaluations that are always allowed, and the last look
    assert point.levels.passes - before <= max_passes + (LINE_SEARCH + 5) * point.evaluation_passes


# Descents in (x, y).

SLOPES = torch.tensor([[1.0, 0.0], [0.5, 1.0], [0.0, 0.3]], dtype=torch.double)
TARGET = vector(0.9, 1.0, 0.8)


def offset(x: Tensor) -> Tensor:
    return torch.sin(3 * x).sum()


PROJECTION = Formula(
    # f = |y - S x|^2 + g(x) and F = |y - t|^2 / 2, so v = g. Where f <= v + s, y is within d = sqrt(s) of S x. So the
    # optimum projects t on the image of S, and y lies d towards t from there; with r = |t - S x|, stationarity in y,
    # r - d = 2 lam d, gives the multiplier.
    2,
    3,
    lambda x, y: (y - SLOPES @ x).square().sum() + offset(x),
    lambda y: (y - TARGET).square().sum() / 2,
)


class ExactValue:
    """v, off by a constant: a joint descent shifts it to be exact at its centre."""

    def mean(self, unit: Tensor) -> Tensor:
        return offset(unit) + 5.0


def exact_optimum() -> Tensor:
    return torch.linalg.lstsq(SLOPES, TARGET.unsqueeze(1)).solution[:, 0]


def test_a_joint_descent_reaches_the_known_constrained_optimum():
    point = trained_point(PROJECTION, vector(0.5, 0.5))
    start = lagrangian_point(point, 0.05, 100)
    found = joint_descent(point, start, ExactValue(), 0.4, 1000, rounds=6)
    best, d = exact_optimum(), math.sqrt(start.slack)
    # L-BFGS stops at a gradient of 1e-2 of its start, some 1e-2^2 of what there was to gain
    assert found.x.tolist() == pytest.approx(best.tolist(), abs=1e-3)
    r = (TARGET - SLOPES @ best).norm().item()
    assert found.multipliers.multiplier == pytest.approx((r - d) / (2 * d), rel=0.05)
    assert found.multipliers.violation < 1e-2 * start.slack
    assert (found.y - SLOPES @ found.x).norm().item() == pytest.approx(d, rel=0.05)


def test_a_joint_descent_stays_within_its_radius():
    centre = vector(0.3, 0.7)
    point = trained_point(PROJECTION, centre)
    start = lagrangian_point(point, 0.05, 100)
    found = joint_descent(point, start, ExactValue(), 0.4, 1000, rounds=6).x
    assert (found - centre).abs().max() <= 0.4 + 1e-12
    # the best of the box has x_0 on its edge; there d/dx_1 |t - S x|^2 = 0
    edge = 0.7
    along = SLOPES[:, 1] @ (TARGET - SLOPES[:, 0] * edge) / SLOPES[:, 1].square().sum()
    assert found.tolist() == pytest.approx([edge, along.item()], abs=1e-3)


def test_a_joint_descent_stays_in_the_unit_cube():
    point = trained_point(PROJECTION, vector(0.95, 0.05))
    start = lagrangian_point(point, 0.05, 100)
    found = joint_descent(point, start, ExactValue(), 0.5, 200).x
    assert bool(((found >= 0) & (found <= 1)).all())


@pytest.mark.parametrize("max_passes", [1.0, 10.0, 100.0])
def test_a_joint_descent_keeps_to_its_passes_but_for_a_line_search(max_passes: float):
    point = trained_point(PROJECTION, vector(0.5, 0.5))
    start = lagrangian_point(point, 0.05, 100)
    before = point.levels.passes
    joint_descent(point, start, ExactValue(), 0.4, max_passes)
    # beside the line search: an update after each of two rounds, and the last look
    assert point.levels.passes - before <= max_passes + (LINE_SEARCH + 3) * point.evaluation_passes


def test_a_joint_descent_does_not_move_if_the_upper_level_is_constant():
    problem = Formula(2, 3, PROJECTION.f, lambda y: 3.0 + 0 * y.sum())
    point = trained_point(problem, vector(0.5, 0.5))
    found = joint_descent(point, lagrangian_point(point, 0.05, 100), ExactValue(), 0.4, 100)
    assert found.x.tolist() == pytest.approx([0.5, 0.5], abs=1e-12)
