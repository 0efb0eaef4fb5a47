"""Methods of multipliers with an exact inner minimiser, on problems solved on paper."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from raybilevel._descents.augmented_lagrangian import Equality, MultiplierState, OneSided
from tests.problems_for_tests import vector

Function = Callable[[Tensor], Tensor]


def newton(value: Function, z: Tensor) -> Tensor:
    """A minimiser by damped Newton steps, down to rounding."""
    for _ in range(50):
        gradient = torch.autograd.functional.jacobian(value, z)
        step = torch.linalg.solve(torch.autograd.functional.hessian(value, z), -gradient)
        length = 1.0
        while value(z + length * step) > value(z) and length > 1e-8:
            length /= 2
        z = z + length * step
        if gradient.abs().max() < 1e-13:
            break
    return z


def merit(method: OneSided | Equality, state: MultiplierState, upper: Function, constraint: Function) -> Function:
    """The method's merit of tensors, so that it can be differentiated: its formula written out once more."""

    def one_sided(z: Tensor) -> Tensor:
        shifted = (state.multiplier + state.penalty * constraint(z)).clamp_min(0)
        return upper(z) + (shifted**2 - state.multiplier**2) / (2 * state.penalty)

    def equality(z: Tensor) -> Tensor:
        c = constraint(z)
        return upper(z) + state.penalty / 2 * c**2 + state.multiplier * c

    written = one_sided if isinstance(method, OneSided) else equality
    probe = vector(0.3, 0.4)
    assert written(probe).item() == pytest.approx(
        method.merit(state, upper(probe).item(), constraint(probe).item()), rel=1e-14
    )
    return written


def solve(
    method: OneSided | Equality, state: MultiplierState, upper: Function, constraint: Function, z: Tensor, steps: int
) -> tuple[Tensor, list[MultiplierState]]:
    states = [state]
    for _ in range(steps):
        z = newton(merit(method, states[-1], upper, constraint), z)
        states.append(method.update(states[-1], constraint(z).item()))
    return z, states


OUTSIDE = vector(-2.0, -4.0)


def distance(z: Tensor) -> Tensor:
    return (z - OUTSIDE).square().sum()


def circle(z: Tensor) -> Tensor:
    return z.square().sum() - 5


def test_one_sided_on_a_disc():
    # the nearest point of the disc is (-1, -2), half-way; there 2 (z - t) + 2 lam z = 0 gives lam = 1
    z, states = solve(OneSided(), MultiplierState(0.1, 0.1), distance, circle, OUTSIDE, 25)
    assert z.tolist() == pytest.approx([-1.0, -2.0], abs=1e-8)
    assert states[-1].multiplier == pytest.approx(1.0, rel=1e-8)
    assert states[-1].violation < 1e-8


def test_one_sided_forgets_a_constraint_that_is_not_active():
    # the free minimum (0.3, -0.2) is inside
    target = vector(0.3, -0.2)
    z, states = solve(
        OneSided(), MultiplierState(3.0, 1.0), lambda z: (z - target).square().sum(), circle, vector(2, 2), 8
    )
    assert z.tolist() == pytest.approx([0.3, -0.2], abs=1e-10)
    assert states[-1].multiplier == 0.0


def test_equality_on_a_circle():
    z, states = solve(Equality(), MultiplierState(0.1, 0.1), distance, circle, OUTSIDE, 20)
    assert z.tolist() == pytest.approx([-1.0, -2.0], abs=1e-8)
    assert states[-1].multiplier == pytest.approx(1.0, rel=1e-8)


def test_equality_finds_a_negative_multiplier():
    # min x^2 + y^2 on x + y = 1: at (1/2, 1/2), where 2 x + lam = 0 gives lam = -1
    z, states = solve(
        Equality(), MultiplierState(2.0, 2.0), lambda z: z.square().sum(), lambda z: z.sum() - 1, vector(3, -1), 25
    )
    assert z.tolist() == pytest.approx([0.5, 0.5], abs=1e-10)
    assert states[-1].multiplier == pytest.approx(-1.0, rel=1e-10)


@pytest.mark.parametrize("penalty", [0.5, 3.0])
def test_the_rate_on_a_quadratic(penalty: float):
    # min (x^2 + y^2) / 2 on 1 - x <= 0, so lam = 1. L is least at x = (lam + rho) / (1 + rho), and so
    # lam' - 1 = (lam - 1) / (1 + rho): a step of half the size would have the rate (1 + rho / 2) / (1 + rho).
    method = OneSided(growth=2.0, sufficient_decrease=0.99)  # no stall at this rate: the penalty stays
    _, states = solve(
        method, MultiplierState(0.2, penalty), lambda z: z.square().sum() / 2, lambda z: 1 - z[0], vector(0, 0), 6
    )
    errors = [1 - state.multiplier for state in states]
    rates = [after / before for before, after in pairwise(errors)]
    assert rates == pytest.approx([1 / (1 + penalty)] * 6, rel=1e-6)


def test_the_penalty_grows_until_the_violation_halves():
    _, states = solve(
        OneSided(), MultiplierState(0.2, 0.01), lambda z: z.square().sum() / 2, lambda z: 1 - z[0], vector(0, 0), 12
    )
    assert states[-1].violation < 1e-4
    # at a penalty above 1 each step more than halves it
    assert 1 < states[-1].penalty <= 4


def test_an_equality_on_a_value_function_has_no_multiplier():
    # F = (y - 1)^2 and c = f - v = y^2 / 2, whose gradient vanishes where c = 0: the multiplier must grow for ever.
    # This is why the published scheme, of five steps, ends away from the solution.
    _, states = solve(
        Equality(),
        MultiplierState(2.0, 2.0),
        lambda z: (z[0] - 1) ** 2 + z[1] ** 2,
        lambda z: z[0] ** 2 / 2,
        vector(1, 0),
        5,
    )
    violations = [state.violation for state in states[1:]]
    assert violations == sorted(violations, reverse=True) and violations[-1] > 1e-3
    assert states[-1].multiplier > states[1].multiplier > 2


def test_a_tolerance_gives_the_value_function_a_multiplier():
    # The same with c = y^2 / 2 - eps: y = sqrt(2 eps), and 2 (y - 1) + lam y = 0 gives lam = 2 (1 - y) / y.
    eps = 0.005
    z, states = solve(
        OneSided(),
        MultiplierState(2.0, 2.0),
        lambda z: (z[0] - 1) ** 2 + z[1] ** 2,
        lambda z: z[0] ** 2 / 2 - eps,
        vector(1, 0),
        30,
    )
    y = math.sqrt(2 * eps)
    assert z[0].item() == pytest.approx(y, abs=1e-8)
    assert states[-1].multiplier == pytest.approx(2 * (1 - y) / y, rel=1e-6)
