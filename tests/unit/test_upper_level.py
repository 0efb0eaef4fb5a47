from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raybilevel._descents import fixed_x
from raybilevel._descents.fixed_x import Budget, LagrangianPoint, at_a_minimum, lagrangian_point, response
from raybilevel._descents.trained_point import TrainedPoint
from raybilevel._lower.levels import Levels
from raybilevel._lower.linearisation import NoisyError
from raybilevel._lower.variables import BoxVariables
from raybilevel.errors import NotFiniteError
from raybilevel.problem import Hyperparameters
from tests.problems_for_tests import Formula, Logistic, Network, Ridge, point_at, trained_point, vector

UNIT = vector(0.4, 0.6, 0.5)
MANY = Budget(100, 100)
"""More products than there are weights."""


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


def test_constants_reach_both_levels_as_the_tensors_of_a_training():
    class Shifted(Ridge):
        def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Any) -> Tensor:
            shift = hyperparameters["decay"]["shift"].square().sqrt()
            return super().lower_loss(model, hyperparameters, batch) + shift

    problem = Shifted()
    model = problem.model().double()
    variables = [BoxVariables(problem.space, {"decay": {"shift": shift}}) for shift in (0.0, 2.5)]
    values = [TrainedPoint(Levels(problem, model, v), UNIT).lower.value for v in variables]
    assert values[1] - values[0] == pytest.approx(2.5, rel=1e-12)


def test_what_a_point_costs():
    assert unfinished().levels.passes == 1 + 30 / 20  # a gradient of each level


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
    found = lagrangian_point(point, 0.05, MANY)
    assert math.isfinite(found.gradient.item()) and found.gradient.dtype == torch.double
    assert torch.equal(model[0].weight, frozen)


# Hypergradients.


class Direct(Ridge):
    """F has a slope in the logarithm of each decay as well."""

    slopes: Tensor

    def upper_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Any) -> Tensor:  # type: ignore[override]
        return super().upper_loss(model, batch) + (self.slopes * self.decay(hyperparameters).log()).sum()


@pytest.mark.parametrize(("time", "error"), [(None, 0.03), (5.0, 0.2)])
def test_an_entry_is_left_out_where_its_parts_cancel_to_less_than_their_error(
    time: float | None, error: float, caplog: pytest.LogCaptureFixture
):
    fixed_x.say_cancelled.cache_clear()
    problem, through = Direct(), Ridge()
    point = trained_point(through, UNIT)
    point.time = None if time is None else torch.full_like(point.y, time)
    indirect = lagrangian_point(point, 0.05, MANY).gradient
    # Of a log-uniform box: d log(decay) / d unit is log(upper / lower).
    unit = math.log(10.0 / 1e-3)
    problem.slopes = indirect / unit * vector(-1 - 0.8 * error, -1 - 1.5 * error, 0.0)
    point = trained_point(problem, UNIT)
    point.time = None if time is None else torch.full_like(point.y, time)
    found = lagrangian_point(point, 0.05, MANY)
    assert found.gradient.tolist() == pytest.approx((indirect + unit * problem.slopes).tolist(), rel=1e-6)
    assert found.known.isnan().tolist() == [True, False, False]
    assert found.hypergradient.error == pytest.approx(error * indirect.norm().item(), rel=1e-3)
    assert "Direct: what F changes with a hyperparameter directly" in caplog.text


@pytest.fixture
def to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Solves do not end before the Krylov space does."""
    monkeypatch.setattr(fixed_x, "FINISHED_TOLERANCE", 0.0)


@pytest.mark.usefixtures("to_the_end")
@pytest.mark.parametrize("kind", [Ridge, Logistic])
def test_at_a_minimum_the_hypergradient_is_the_implicit_one(kind: type[Ridge]):
    problem = kind(rows=20)
    point = trained_point(problem, UNIT)
    exact = implicit(problem, point.y, UNIT)
    found = lagrangian_point(point, 0.05, MANY)
    assert (found.gradient - exact).norm() < 1e-5 * exact.norm()  # three products reach all of three dimensions


def test_the_hypergradient_is_that_of_the_reduced_problem():
    problem = Ridge(rows=20)
    found = lagrangian_point(trained_point(problem, UNIT), 0.05, MANY)
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


@pytest.mark.usefixtures("to_the_end")
def test_a_part_of_the_upper_level_that_is_of_x_alone_is_in_the_hypergradient():
    point = trained_point(Priced(rows=20), UNIT)
    exact = implicit(Logistic(rows=20), point.y, UNIT)
    price = torch.autograd.functional.jacobian(lambda unit: 0.1 * Logistic().values(unit).sum(), UNIT)
    found = lagrangian_point(point, 0.05, MANY).gradient
    assert (found - exact - price).norm() < 1e-5 * exact.norm() < 0.1 * price.norm()


def test_an_unfinished_training_answers_as_its_own_time_lets_it():
    # against the derivative of ten steps of gradient descent; that of a minimum is three times as long
    problem, steps = Ridge(rows=20, optimizer=sgd, epochs=10), 10
    torch.manual_seed(0)
    start = problem.model().double().get_parameter("weight")[0].detach()

    def after(x: Tensor) -> Tensor:
        y, inputs, targets = start, *problem.lower
        for _ in range(steps):
            y = y - 0.05 * (inputs.T @ (inputs @ y - targets) / len(inputs) + x * y)
        return problem.F(y)

    exact = torch.autograd.functional.jacobian(lambda unit: after(problem.values(unit)), UNIT)
    point = trained_point(problem, UNIT)
    found, minimum = lagrangian_point(point, 0.05, MANY).gradient, implicit(problem, point.y, UNIT)
    assert (found - exact).norm() < 0.15 * exact.norm() < 0.15 * (minimum - exact).norm()


def test_weights_that_were_never_trained_do_not_answer():
    point = trained_point(Logistic(rows=20), UNIT)
    point.time = vector(10.0, 0.0, 10.0)
    answer = response(point, MANY).vector
    assert answer[1] == 0 and answer[0] != 0


@pytest.mark.parametrize(
    ("usual", "most", "unfinished"), [(4, 10, 4), (1, 10, 3), (-3, 2, 2), (50, 90, fixed_x.UNFINISHED_PRODUCTS)]
)
def test_products_of_an_unfinished_training(usual: int, most: int, unfinished: int):
    assert Budget(usual, most).unfinished == unfinished


def test_an_unfinished_training_keeps_to_its_products():
    point = trained_point(Logistic(rows=40, dimension=6), torch.full((6,), 0.1).double())
    point.time = torch.full((6,), 1e6).double()
    assert lagrangian_point(point, 0.05, Budget(2, 2)).hypergradient.iterations == 2


def test_flat_directions_of_f_are_left_alone():
    # f pins y_0 to x and nothing pins y_1, so a training answers to x in y_0 only: dF/dx = y_0 - 3
    problem = Formula(1, 2, lambda x, y: (y[0] - x[0]).square(), lambda y: (y[0] - 3) ** 2 / 2 + (y[1] - 5) ** 2)
    point = trained_point(problem, vector(0.25))
    found = lagrangian_point(point, 0.05, MANY)
    assert found.gradient.item() == pytest.approx(0.25 - 3, rel=1e-6)


def test_an_f_that_is_flat_along_f_does_not_move():
    problem = Formula(1, 2, lambda x, y: (y[0] - x[0]).square(), lambda y: y[1])  # F follows what f leaves alone
    found = lagrangian_point(trained_point(problem, vector(0.25)), 0.05, MANY)
    assert found.gradient.tolist() == [0.0]
    assert (found.multiplier, found.decrease) == (0.0, 0.0)


def test_products_are_as_many_as_the_memory_holds():
    weights = torch.zeros(1000)  # 4 kB a vector, 30 vectors beside two a product
    assert Budget(5, 40).within(None, weights) == Budget(5, 40)
    assert Budget(5, 40).within(4000 * 50, weights) == Budget(5, 10)
    assert Budget(20, 40).within(4000 * 30.5, weights) == Budget(0, 0)
    assert Budget(5, 40).within(1.0, torch.zeros(1000, device="meta")) == Budget(5, 40)  # a device with its own memory


def test_many_derivatives_may_cost_a_training():
    point = trained_point(Logistic(rows=20, batch=8, epochs=8, optimizer=sgd), UNIT)
    few, many = (Budget.of(point.levels, 10.0, 0.2, point.time, derivatives) for derivatives in (1, 10))
    assert few.most < 1 and many.unfinished == 3


def test_a_negative_curvature_bounds_the_time_of_a_training():
    h = vector(-2.0, 0.0, 1.0)
    assert at_a_minimum(h).tolist() == pytest.approx([1 / (2 + 2 / 3), 3 / 2, 1 / (1 + 2 / 3)])
    assert at_a_minimum(vector(-1e-9, 1e-9, 1.0)).abs().tolist() == pytest.approx([0.1, 0.1, 1.0], rel=1e-6)


@pytest.mark.parametrize("time", [None, 5.0])
def test_a_direction_along_which_f_falls_is_not_followed(time: float | None):
    # Near its maximum f falls on either side of y_1: the answer of y_0, dF/dx = 1, is what matters.
    problem = Formula(
        1, 2, lambda x, y: (y[0] - x[0]).square() + (y[1].square() - 1).square() / 4, lambda y: y[0] + y[1]
    )
    model = problem.model().double()
    with torch.no_grad():
        model.get_parameter("weight").copy_(torch.tensor([[0.4, 0.1]]))
    point = point_at(problem, model, vector(0.4))
    point.time = None if time is None else vector(time, time)
    found = lagrangian_point(point, 0.05, MANY)
    assert 0.5 < found.gradient.item() < 1.01 and found.multiplier > 0


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


@pytest.mark.usefixtures("to_the_end")
@pytest.mark.parametrize("passes", [6.6, 7.3, 9.9])
def test_a_hypergradient_keeps_to_its_passes(passes: float):
    point = trained_point(Logistic(rows=20, dimension=6), torch.full((6,), 0.4).double())
    lagrangian_point(point, 0.05, Budget.of(point.levels, passes, 1.0, point.time))
    assert passes - 1 < point.levels.passes <= passes


@pytest.mark.usefixtures("to_the_end")
def test_the_lagrangian_point_minimises_f_plus_its_multiple():
    problem = Logistic(rows=20)
    point = trained_point(problem, UNIT)
    multiplier, x = lagrangian_point(point, 1e-4, MANY).multiplier, problem.values(UNIT)
    y = point.y - response(point, MANY).vector / multiplier
    upper, lower = (torch.autograd.functional.jacobian(level, y) for level in (problem.F, lambda y: problem.f(x, y)))
    force = upper + multiplier * (lower - point.lower.in_y)
    assert force.norm() < 1e-3 * upper.norm()  # of second order in the displacement
    assert point.upper.value - problem.F(y).item() == pytest.approx(1e-4 * point.upper.value, rel=1e-2)


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


def in_units(units: tuple[float, float, float], time: float | None) -> LagrangianPoint:
    """time: in units of those of f and of the weights."""
    problem, y = Scaled(*units), trained_point(Logistic(rows=20), UNIT).y
    model = problem.model().double()
    with torch.no_grad():
        model.get_parameter("weight").copy_(y / units[2])
    point = point_at(problem, model, UNIT)
    point.time = None if time is None else torch.full_like(y, time / units[1] / units[2] ** 2)
    return lagrangian_point(point, 0.05, Budget(2, 2))


@pytest.mark.parametrize(
    "units", [(1000, 1, 1), (1, 7, 1), (1, 1, 3), (1000, 7, 3), (1e-6, 1e6, 1), (1, 1, 1e3), (1, 1, 1e-3)]
)
@pytest.mark.parametrize("time", [None, 3.0])
def test_units_do_not_matter(units: tuple[float, float, float], time: float | None):
    plain, scaled = (in_units(u, time) for u in ((1, 1, 1), units))
    agreement = 1e-5  # of differences
    assert (scaled.gradient / units[0] - plain.gradient).norm() < agreement * plain.gradient.norm()
    assert scaled.multiplier * units[1] / units[0] == pytest.approx(plain.multiplier, rel=agreement)


def constant(kind: type[Ridge]) -> type[Ridge]:
    class Constant(kind):
        def upper_loss(self, model: nn.Module, batch: Any) -> Tensor:
            return 3.0 + 0.0 * model.get_parameter("weight").sum()

    return Constant


def test_nothing_moves_if_the_upper_level_is_constant():
    point = unfinished(constant(Logistic))
    found = lagrangian_point(point, 0.05, MANY)
    assert found.gradient.tolist() == [0.0, 0.0, 0.0]
    assert (found.multiplier, found.decrease) == (0.0, 0.0)


# Precision of gradients.


class Rounded(Logistic):
    """Its losses are computed in another precision than that of the weights."""

    digits = torch.bfloat16

    def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Any) -> Tensor:
        weights = model.get_parameter("weight")[0]
        penalty = (self.decay(hyperparameters) * weights.square()).sum() / 2
        outputs = (batch[0].to(self.digits) @ weights.to(self.digits)).to(weights)
        return nn.functional.softplus(-batch[1].sign() * outputs).mean() + penalty


@pytest.mark.parametrize(
    ("weights", "digits", "length", "error"),
    [
        (torch.double, torch.double, 1e-8, 0.0),
        (torch.double, torch.float32, 1e-6, 1e-2),
        (torch.float32, torch.bfloat16, 1e-2, 0.2),
    ],
)
def test_a_difference_is_as_long_as_the_noise_of_gradients_asks(
    weights: torch.dtype, digits: torch.dtype, length: float, error: float
):
    unit = torch.full((6,), 0.3).double()
    y = trained_point(Logistic(rows=20, dimension=6), unit).y
    found = []
    for precision in (weights, digits):
        problem = Rounded(rows=20, dimension=6, dtype=weights)
        problem.digits = precision
        model = problem.model().to(weights)
        with torch.no_grad():
            model.get_parameter("weight").copy_(y)
        point = point_at(problem, model, unit)
        point.time = torch.full_like(point.y, 5.0)
        found.append(lagrangian_point(point, 0.05, MANY).gradient)
    assert point.products.apart >= length * point.y.norm()
    assert (found[1] - found[0]).norm() <= error * found[0].norm()


@pytest.mark.parametrize(
    ("time", "dtype", "low"),
    [
        (500.0, torch.float32, 1e-4), (math.inf, torch.float32, 1e-4), (500.0, torch.bfloat16, 1e-4),
        # Noise, 0.003 of the largest curvature, makes one of 0.002 larger, so that it seems to be known.
        (500.0, torch.float32, 2e-3),
    ],
)  # fmt: skip
def test_a_hypergradient_that_coarse_gradients_shorten_is_left_out(time: float, dtype: torch.dtype, low: float):
    """A long training answers along curvatures that such gradients cannot tell from 0."""
    scales = torch.tensor([1.0, low])

    def lower(x: Tensor, y: Tensor) -> Tensor:
        return (scales * (y.bfloat16().float() - x[0]).square()).sum() / 2

    problem = Formula(1, 2, lower, lambda y: y.sum())
    problem.dtype = dtype
    model = problem.model().to(dtype)
    with torch.no_grad():
        model.get_parameter("weight").copy_(torch.tensor([[1.3, 0.7]]))
    point = point_at(problem, model, vector(0.5))
    point.time = torch.full_like(point.y, time)
    with pytest.raises(
        NoisyError, match=r"computed in torch\.bfloat16, whose noise makes the hypergradient up to \d+ %"
    ):
        lagrangian_point(point, 0.05, MANY)


def test_kinks_within_the_usual_length_make_a_difference_shorter():
    # |y| has a kink at 0, which a step of the usual length in float32 passes, 3.5e-4 of |y| = 1
    problem = Formula(1, 2, lambda x, y: (y[0] - 1).square() + (y[1] - 1e-5).abs(), lambda y: y[0] - y[1])
    problem.dtype = torch.float32
    model = problem.model()
    with torch.no_grad():
        model.get_parameter("weight").copy_(torch.tensor([[1.0, 1.1e-4]]))
    point = point_at(problem, model, vector(0.5))
    product = point.products.hessian(point.upper.in_y)
    assert product.tolist() == pytest.approx([2, 0], rel=0.02)


def test_what_noise_drowns_is_said():
    chance = torch.Generator().manual_seed(0)

    class Chance(Logistic):
        def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Any) -> Tensor:
            weights = model.get_parameter("weight")[0]
            noise = torch.randn(weights.shape, generator=chance, dtype=weights.dtype)
            return super().lower_loss(model, hyperparameters, batch) + noise @ weights

    point = point_at(Chance(rows=20), Logistic().model().double(), UNIT)
    with pytest.raises(NoisyError, match=r"changes by \d+ % from one length to another, so it is noise"):
        lagrangian_point(point, 0.05, MANY)
