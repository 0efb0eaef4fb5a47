"""The method of multipliers with an exact inner minimiser, on problems solved on paper."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from raybilevel._descents.augmented_lagrangian import Equality, MultiplierState
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


def merit(method: Equality, state: MultiplierState, upper: Function, constraint: Function) -> Function:
    """The method's merit of tensors, so that it can be differentiated: its formula written out once more."""

    def written(z: Tensor) -> Tensor:
        c = constraint(z)
        return upper(z) + state.penalty / 2 * c**2 + state.multiplier * c

    probe = vector(0.3, 0.4)
    assert written(probe).item() == pytest.approx(
        method.merit(state, upper(probe).item(), constraint(probe).item()), rel=1e-14
    )
    return written


def solve(
    method: Equality, state: MultiplierState, upper: Function, constraint: Function, z: Tensor, steps: int
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
