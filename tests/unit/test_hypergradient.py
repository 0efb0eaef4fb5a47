"""Every estimator against central differences of F(x, y*(x)), y* by Newton's method, and against the others."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raybilevel._lower.levels import Levels
from raybilevel._lower.linearisation import Differences
from raybilevel._lower.variables import BoxVariables, ModuleVariables, weights_of
from raybilevel.errors import ConfigError, NotFiniteError, ProblemError
from raybilevel.hypergradient import (
    BilevelFunctions,
    ConjugateGradients,
    DynamicBarrier,
    Estimator,
    FirstOrder,
    Implicit,
    MinimalResidual,
    NeumannSeries,
    Selection,
    Unrolled,
    solve_lower,
)
from raybilevel.hypergradient._descent import BilevelDescent
from raybilevel.methods._hypergradient import HypergradientDescent
from raybilevel.problem import LargeUpperLevel
from tests.problems_for_tests import Logistic, levels_at

P, N = 4, 12


class Example:
    """A logistic lower level with decays exp(x) in random directions; F depends on x directly, too."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.double)

        self.a, self.t, self.b, self.u, self.g = draw(30, N), draw(30).sign(), draw(20, N), draw(20), draw(P, N)
        self.x = draw(P) / 2
        self.y = self.newton(self.x)

    def lower(self, x: Tensor, y: Tensor) -> Tensor:
        loss = nn.functional.softplus(-self.t * (self.a @ y)).mean()
        return loss + (x.exp() @ self.g.square() * y.square()).sum() / 20

    def upper(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.b @ y - self.u).square().mean() / 2 + x.square().sum() / 100 + x[0] * y[1]

    def functions(self) -> BilevelFunctions:
        return BilevelFunctions([self.upper], [self.lower])

    def in_two_terms(self) -> BilevelFunctions:
        """The same functions; with several terms no graph is kept."""
        halves = [lambda x, y: self.lower(x, y) / 2] * 2
        return BilevelFunctions([lambda x, y: self.upper(x, y) / 2] * 2, halves)

    def newton(self, x: Tensor) -> Tensor:
        y = torch.zeros(N, dtype=torch.double)
        for _ in range(30):
            gradient = torch.func.grad(self.lower, 1)(x, y)
            y = y - torch.linalg.solve(torch.func.hessian(self.lower, 1)(x, y), gradient)
        return y

    @cached_property
    def differences(self) -> Tensor:
        def reduced(x: Tensor) -> Tensor:
            return self.upper(x, self.newton(x))

        step = 1e-5
        units = torch.eye(P, dtype=torch.double) * step
        return torch.stack([(reduced(self.x + e) - reduced(self.x - e)) / (2 * step) for e in units])


@pytest.fixture(scope="module")
def example() -> Example:
    return Example()


@pytest.mark.parametrize(
    ("estimator", "tolerance"),
    [
        # 1e-8: what central differences with step 1e-5 leave
        (Implicit(ConjugateGradients(1e-12)), 1e-8),
        (Implicit(MinimalResidual(1e-12)), 1e-8),
        (Implicit(NeumannSeries(800)), 1e-8),
        (Implicit(MinimalResidual(1e-12, selection=Selection("ritz_generalized_singular"))), 1e-8),
        (Unrolled(150, 1.0), 1e-5),
        (Unrolled(150, 0.3, momentum=0.7), 1e-5),
        (Unrolled(80, 1.0, mode="forward"), 1e-4),
        (Unrolled(150, 1.0, truncate=100), 1e-5),
        # of order 1 / multiplier
        (FirstOrder(multiplier=1e3, steps=150, rate=1.0), 1e-2),
        # of order 1 / multiplier, which grows with the steps
        (DynamicBarrier(steps=150, rate=1.0, inner_rate=1.0), 0.1),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, float) else f"{value:g}",
)
def test_every_estimator_agrees_with_central_differences(
    example: Example, estimator: Estimator, tolerance: float
) -> None:
    truth = example.differences
    found = estimator(example.functions(), example.x, example.y)
    assert float((found.gradient - truth).norm()) <= tolerance * float(truth.norm())


def test_forward_and_reverse_unrolling_agree_far_from_convergence(example: Example) -> None:
    start = torch.zeros(N, dtype=torch.double)
    for momentum in (0.0, 0.7):
        reverse, forward = (
            Unrolled(7, 0.2, momentum, mode=mode)(example.functions(), example.x, start)
            for mode in ("reverse", "forward")
        )
        torch.testing.assert_close(reverse.gradient, forward.gradient, rtol=1e-12, atol=1e-14)

        def unrolled(x: Tensor, momentum: float = momentum) -> Tensor:
            y, velocity = start, torch.zeros_like(start)
            for _ in range(7):
                velocity = momentum * velocity + torch.func.grad(example.lower, 1)(x, y)
                y = y - 0.2 * velocity
            return example.upper(x, y)

        torch.testing.assert_close(reverse.gradient, torch.func.grad(unrolled)(example.x), rtol=1e-12, atol=1e-14)


def test_truncation_leaves_out_the_earliest_steps(example: Example) -> None:
    start = torch.zeros(N, dtype=torch.double)
    whole, half = (Unrolled(10, 0.2, truncate=t)(example.functions(), example.x, start) for t in (10, 5))
    full = Unrolled(10, 0.2)(example.functions(), example.x, start)
    assert torch.equal(whole.gradient, full.gradient) and not torch.allclose(half.gradient, full.gradient)
    assert half.products == full.products / 2


def test_products_are_those_of_dense_second_derivatives(example: Example) -> None:
    hessian = torch.func.hessian(example.lower, 1)(example.x, example.y)
    mixed = torch.func.jacrev(torch.func.grad(example.lower, 1), 0)(example.x, example.y).T
    q, r = torch.arange(N, dtype=torch.double) - 3, torch.arange(P, dtype=torch.double) + 1
    for functions in (example.functions(), example.in_two_terms()):
        linear = functions.linearise(example.x, example.y)
        torch.testing.assert_close(linear.hessian(q), hessian @ q)
        torch.testing.assert_close(linear.mixed(q), mixed @ q)
        torch.testing.assert_close(linear.mixed_transposed(r), mixed.T @ r)
        assert functions.passes == 3


def test_products_by_differences_are_the_exact_ones_and_cost_a_gradient_each(example: Example) -> None:
    functions, exact = example.functions(), example.functions().linearise(example.x, example.y)
    differences = Differences(functions, example.x, example.y)
    q, r = torch.arange(N, dtype=torch.double) - 3, torch.arange(P, dtype=torch.double) + 1
    for cost, name, direction in ((2, "hessian", q), (1, "hessian", q), (2, "mixed", q), (1, "mixed_transposed", r)):
        before, truth = functions.passes, getattr(exact, name)(direction)
        found = getattr(differences, name)(direction)
        assert functions.passes - before == cost
        # a difference of 1e-8 of the point, and rounding of 1e-16 over that
        assert float((found - truth).norm()) <= 1e-6 * float(truth.norm())


def test_terms_that_are_linear_or_constant_are_only_added(example: Example) -> None:
    """As those of a batch that neither x nor the weights play a part in."""
    one = torch.ones(N, dtype=torch.double)
    extra = [lambda x, y: one @ y, lambda x, y: one.sum()]
    functions = BilevelFunctions([example.upper, *extra], [example.lower, *extra])
    plain, x, y = example.functions(), example.x, example.y
    for found, expected in ((functions.upper(x, y), plain.upper(x, y)), (functions.lower(x, y), plain.lower(x, y))):
        torch.testing.assert_close(found.in_y, expected.in_y + one)
        assert found.value == pytest.approx(expected.value + float(one @ y) + N)
    linear, same = functions.linearise(x, y), plain.linearise(x, y)
    torch.testing.assert_close(linear.hessian(one), same.hessian(one))
    torch.testing.assert_close(linear.mixed(one), same.mixed(one))
    torch.testing.assert_close(linear.mixed_transposed(one[:P]), same.mixed_transposed(one[:P]))


def test_first_order_estimate_by_hand() -> None:
    # f = (y - x)^2 / 2 and F = y^2 / 2: y_m = m x / (1 + m), z = x; the estimate is m (x - y_m) = m x / (1 + m).
    functions = BilevelFunctions([lambda x, y: y.square().sum() / 2], [lambda x, y: (y - x).square().sum() / 2])
    x = torch.tensor([2.0], dtype=torch.double)
    found = FirstOrder(multiplier=4.0, growth=2.0, steps=200, rate=0.5)(functions, x, x)
    assert found.gradient.item() == pytest.approx(4 * 2 / 5, abs=1e-12)
    assert found.memory[2] == 8.0
    # One step of BOME from y = 3 with y_T = 2.5: q = (1 - 0.25) / 2, q_x = -1 + 0.5, q_y = 1, F_y = 3, so
    # lambda = max(0, 0.5 - 3 / 1.25) = 0 and the direction in x is 0.
    barrier = DynamicBarrier(steps=1, inner_steps=1, inner_rate=0.5)
    assert barrier(functions, x, torch.tensor([3.0], dtype=torch.double)).gradient.item() == 0.0
    # From y = 1: y_T = 1.5, q_x = 1 - 0.5, q_y = -1, F_y = 1: lambda = 0.5 + 1 / 1.25 = 1.3.
    found = barrier(functions, x, torch.tensor([1.0], dtype=torch.double))
    assert found.gradient.item() == pytest.approx(1.3 * 0.5)


def test_a_rate_that_diverges_is_an_error(example: Example) -> None:
    with pytest.raises(NotFiniteError, match="rate"):
        Unrolled(300, 50.0)(example.functions(), example.x, torch.ones(N, dtype=torch.double))


@pytest.mark.parametrize("mode", ["reverse", "forward"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_derivatives_that_explode_though_the_steps_do_not_are_an_error(mode: Any, momentum: float) -> None:
    # At the minimum y = 0 of f = |y|^2 / 2 + x y_0 with x = 0 no step moves, and each multiplies derivatives by -4.
    def lower(x: Tensor, y: Tensor) -> Tensor:
        return y.square().sum() / 2 + x.sum() * y[0]

    functions = BilevelFunctions([lambda x, y: (y - 1).square().sum()], [lower])
    x, y = torch.zeros(2, dtype=torch.double), torch.zeros(3, dtype=torch.double)
    with pytest.raises(NotFiniteError, match="derivatives explode along the 40 unrolled steps: the rate 5"):
        Unrolled(40, 5.0, momentum, mode=mode)(functions, x, y)
    # Near the limit, 2 (1 + momentum), derivatives swing, and do not explode.
    found = Unrolled(400, 1.8 * (1 + momentum), momentum, mode=mode)(functions, x, y).gradient
    torch.testing.assert_close(found, torch.full_like(x, 2.0), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Unrolled(0), lambda: Unrolled(momentum=1.0), lambda: Unrolled(truncate=3, mode="forward"),
        lambda: Unrolled(mode="sideways"), lambda: FirstOrder(growth=0.5), lambda: DynamicBarrier(steps=0),  # type: ignore[arg-type]
        lambda: NeumannSeries(rate=-1.0), lambda: MinimalResidual(criterion="luck"),
        lambda: MinimalResidual(criterion="error", selection=Selection("ritz")), lambda: Selection("random"),  # type: ignore[arg-type]
        lambda: Selection(end="middle"), lambda: Selection(dimension=0),  # type: ignore[arg-type]
    ],
)  # fmt: skip
def test_wrong_settings_are_refused(make: object) -> None:
    with pytest.raises(ConfigError):
        make()  # type: ignore[operator]


def test_the_lower_level_is_solved_to_the_tolerance(example: Example) -> None:
    found = solve_lower(example.functions(), example.x, torch.zeros(N, dtype=torch.double), 1e-7)
    assert found.gradient_norm <= 1e-7
    torch.testing.assert_close(found.y, example.y, rtol=0, atol=1e-5)


def test_the_lower_level_is_solved_no_further_than_to_the_tolerance() -> None:
    # f = |y|^2 / 2 in so many directions that no entry of the gradient is near the tolerance where the norm is.
    functions = BilevelFunctions([], [lambda x, y: y.square().sum() / 2])
    start = torch.full((400,), 0.01, dtype=torch.double)
    found = solve_lower(functions, start[:0], start, 0.2)
    assert torch.equal(found.y, start) and found.iterations == 0
    assert found.gradient_norm == pytest.approx(0.2)
    assert functions.passes == 1
    # Nor is what was seen there asked for again.
    found = solve_lower(functions, start[:0], start, 1e-9)
    here = functions.lower(start[:0], found.y)
    torch.testing.assert_close(found.here, here)
    assert functions.passes == 1 + found.iterations + 2


def test_a_plain_above_the_start_is_no_solution() -> None:
    # A narrow well: the first step of L-BFGS, of length 1, leaves it for where f is flat.
    functions = BilevelFunctions([], [lambda x, y: -torch.exp(-50 * y.square()).sum()])
    start = torch.tensor([0.1], dtype=torch.double)
    assert functions.lower(start[:0], start - 1).in_y.abs().item() < 1e-6
    found = solve_lower(functions, start[:0], start, 1e-6)
    assert found.y.item() == pytest.approx(0, abs=1e-6)


def test_functions_of_a_problem_on_its_box() -> None:
    problem = Logistic(dimension=3)
    model = problem.model().to(problem.dtype)
    unit, y = torch.tensor([0.3, 0.5, 0.8], dtype=torch.double), torch.tensor([0.2, -0.1, 0.4], dtype=torch.double)
    functions = Levels(problem, model, BoxVariables(problem.space, {}))
    before = weights_of(model)
    lower, upper = functions.lower(unit, y), functions.upper(unit, y)
    expected = torch.func.grad(lambda u, y: problem.f(problem.values(u), y), (0, 1))(unit, y)
    torch.testing.assert_close((lower.in_x, lower.in_y), expected)
    torch.testing.assert_close(upper.in_y, torch.func.grad(problem.F)(y))
    assert torch.equal(upper.in_x, torch.zeros(3, dtype=torch.double))
    assert torch.equal(weights_of(model), before)


def test_functions_of_a_problem_with_an_upper_module() -> None:
    class Weighted(LargeUpperLevel, Logistic):
        def upper_variables(self) -> nn.Module:
            return nn.Sequential(nn.Linear(1, self.dimension, bias=False), nn.Dropout(0.5))

        def decay(self, hyperparameters: object) -> Tensor:
            linear, dropout = hyperparameters["upper"]  # type: ignore[index]
            return dropout(linear.weight.flatten()).exp()  # type: ignore[no-any-return]

    problem = Weighted(dimension=3)
    x, y = torch.tensor([-1.0, 0.1, 0.5], dtype=torch.double), torch.tensor([0.2, -0.1, 0.4], dtype=torch.double)
    module = problem.upper_variables().to(problem.dtype)
    functions = Levels(problem, problem.model().to(problem.dtype), ModuleVariables(module, {}))
    expected = torch.func.grad(lambda x, y: problem.f(x.exp(), y), (0, 1))(x, y)
    lower = functions.lower(x, y)
    torch.testing.assert_close((lower.in_x, lower.in_y), expected)


class Once(torch.autograd.Function):
    """tanh, without a second derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return gradient * (1 - y * y)


class Detached(Once):
    """As code has it that works on arrays, or in a kernel of its own: autograd sees constants."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return gradient * (1 - y.detach() ** 2)


class Activated(Logistic):
    """A network whose activation is given."""

    def __init__(self, activation: Any) -> None:
        super().__init__(rows=20, epochs=3, optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1))
        self.activation = activation

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 1))

    def lower_loss(self, model: Any, hyperparameters: Any, batch: Any) -> Tensor:
        decay = self.decay(hyperparameters).sum()
        return self.upper_loss(model, batch) + decay * model[0].weight.square().sum()

    def upper_loss(self, model: Any, batch: Any) -> Tensor:
        outputs = model[1](self.activation(model[0](batch[0]))).squeeze(-1)
        return nn.functional.softplus(-batch[1].sign() * outputs).mean()


# Torch says nothing of `Once` either: what raises lies on no way from the gradient to the weights.
@pytest.mark.parametrize(("activation", "warnings"), [(torch.tanh, 0), (Once.apply, 1), (Detached.apply, 1)])
def test_products_that_miss_a_second_derivative_are_warned_of(
    activation: Any, warnings: int, caplog: pytest.LogCaptureFixture
) -> None:
    problem = Activated(activation)
    start = problem.config(torch.full((3,), 1e-3))
    descent = BilevelDescent(problem, start, HypergradientDescent(steps=2), problem.space)
    while not descent.finished:
        descent.run_step()
    found = [message for message in caplog.messages if "Use estimator 'first_order'" in message]
    assert len(found) == warnings


def test_a_first_order_estimator_is_not_compared_with_second_derivatives(caplog: pytest.LogCaptureFixture) -> None:
    problem, settings = Activated(Detached.apply), HypergradientDescent(steps=1, estimator="first_order")
    BilevelDescent(problem, problem.config(torch.ones(3)), settings, problem.space).run_step()
    assert not caplog.messages


def test_a_loss_that_cannot_be_differentiated_twice_names_first_order() -> None:
    problem = Activated(lambda hidden: torch.cdist(hidden, hidden + 1)[:, :5])
    descent = BilevelDescent(problem, problem.config(torch.ones(3)), HypergradientDescent(steps=1), problem.space)
    with pytest.raises(ProblemError, match=r"cannot be differentiated twice \(.*_cdist_backward.* 'first_order'"):
        descent.run_step()


def test_fused_attention_has_products() -> None:
    class Attentive(Activated):
        def upper_loss(self, model: Any, batch: Any) -> Tensor:
            hidden = model[0](batch[0]).view(1, 1, -1, 5)
            mixed = nn.functional.scaled_dot_product_attention(hidden, hidden, hidden)
            return nn.functional.softplus(model[1](mixed)).mean()

    problem = Attentive(None)
    model = problem.model().double()
    levels, x, y = levels_at(problem, model, problem.config(torch.ones(3)))
    direction = torch.linspace(-1, 1, len(y), dtype=torch.double)
    product = levels.linearise(x, y).hessian(direction)
    compared = Differences(levels, x, y).hessian(direction)
    assert (product - compared).norm() < 1e-5 * compared.norm()
