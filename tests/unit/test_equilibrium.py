"""Fixed points: Anderson acceleration, hypergradients of equilibria, the deep-equilibrium classifier."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.equilibrium import gradients
from raybilevel.errors import ConfigError, NotFiniteError, ProblemError
from raybilevel.hypergradient import AndersonAcceleration, Equilibrium, Implicit, MinimalResidual
from raybilevel.hypergradient._descent import BilevelDescent, dump_checkpoint, load_checkpoint
from raybilevel.methods._hypergradient import HypergradientDescent
from raybilevel.problems.equilibrium import EquilibriumDigits
from tests.problems_for_tests import Ridge

METHOD = HypergradientDescent(
    steps=4, rate=0.02, lower="fixed_point", estimator="equilibrium", lower_tolerance=1e-9,
    estimator_settings={"tolerance": 1e-9},
)  # fmt: skip


def affine(rate: float = 0.95) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """z -> A z + b in three independent rows of eight, |A| = rate, and its fixed point."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(3, 8, 8, generator=generator, dtype=torch.double)
    a = rate * a / torch.linalg.matrix_norm(a, 2)[:, None, None]
    b = torch.randn(3, 8, generator=generator, dtype=torch.double)
    return lambda z: (a @ z[:, :, None])[:, :, 0] + b, torch.linalg.solve(torch.eye(8).to(a) - a, b)


def test_anderson_acceleration_finds_the_fixed_point_in_fewer_evaluations() -> None:
    step, truth = affine()
    start = torch.zeros_like(truth)
    found = AndersonAcceleration(1e-10, 500, ridge=1e-14).solve(step, start)
    torch.testing.assert_close(found.y, truth, rtol=1e-7, atol=1e-7)
    assert found.residual <= 1e-10
    plain = AndersonAcceleration(1e-10, 500, memory=1).solve(step, start)
    torch.testing.assert_close(plain.y, truth, rtol=1e-7, atol=1e-7)
    assert found.iterations < plain.iterations / 2
    # with as many iterates as there are dimensions it is GMRES: exact after nine residuals, and one to see it
    whole = AndersonAcceleration(1e-8, 500, memory=9, ridge=1e-15).solve(step, start)
    assert whole.iterations <= 12
    again = AndersonAcceleration(1e-10).solve(step, truth)
    assert again.iterations == 1
    limited = AndersonAcceleration(1e-10, 3).solve(step, start)
    assert limited.iterations == 3 and limited.residual > 1e-10


@pytest.mark.parametrize("dtype", [torch.double, torch.float])
def test_collinear_residuals_are_combined(dtype: torch.dtype) -> None:
    """With one number a row all residuals are; in single precision a ridge of 1e-8 is lost."""
    found = AndersonAcceleration().solve(lambda y: y / 2 + 1, torch.zeros(4, 1, dtype=dtype))
    torch.testing.assert_close(found.y, torch.full((4, 1), 2.0, dtype=dtype), rtol=0, atol=1e-4)


def test_an_iteration_that_diverges_is_an_error() -> None:
    with pytest.raises(NotFiniteError, match="fixed-point"):
        AndersonAcceleration(memory=1, limit=2000).solve(lambda z: 3 * z + 1, torch.zeros(1, 2))


def small(**options: Any) -> EquilibriumDigits:
    problem = EquilibriumDigits(train=40, hidden=6, **options)
    problem.dtype = torch.float64
    return problem


def test_hypergradients_of_an_equilibrium_agree() -> None:
    """The equilibrium estimate against central differences of F(x, z*(x)), and against MINRES on the Hessian of
    |z - g(z)|^2 / 2, whose minimum is the same point."""
    descent = BilevelDescent(small(), {"start": 0.0}, METHOD)
    descent.run_step()
    x, functions = descent.x.detach().clone(), descent.levels

    def solved(x: Tensor) -> Tensor:
        step = lambda z: functions.mapped(x, z.flatten())  # noqa: E731
        return AndersonAcceleration(1e-13, 1000).solve(step, torch.zeros(40, 6, dtype=torch.double)).y.flatten()

    y = solved(x)
    found = Equilibrium(1e-13, 1000)(functions, x, y)
    other = Implicit(MinimalResidual(1e-12, limit=5000))(functions, x, y)
    torch.testing.assert_close(found.gradient, other.gradient, rtol=1e-6, atol=1e-9)
    for number in (0, 100, len(x) - 120, len(x) - 1):
        step = torch.zeros_like(x)
        step[number] = 1e-5
        above, below = (functions.upper(p, solved(p)).value for p in (x + step, x - step))
        # 1e-6: the differences' truncation and rounding
        assert found.gradient[number].item() == pytest.approx((above - below) / 2e-5, rel=1e-5, abs=1e-9)
    warm = Equilibrium(1e-13, 1000)(functions, x, y, found.memory)
    assert warm.iterations == 1 < found.iterations


def test_memory_does_not_grow_with_the_iterations() -> None:
    problem = small()
    descent = BilevelDescent(problem, {"start": 0.0}, METHOD)
    found = gradients(problem, descent.x.detach())
    saved = {way: [one.saved_bytes for one in found if one.way == way] for way in ("unrolled", "implicit")}
    assert len(set(saved["implicit"])) == 1
    assert saved["unrolled"] == sorted(saved["unrolled"]) and saved["unrolled"][-1] > 10 * saved["implicit"][-1]
    last = {one.way: one.error for one in found}  # after 80 iterations of a contraction, both are right
    assert max(last.values()) < 1e-3


def test_a_network_is_learned_and_resumes_exactly() -> None:
    problem = EquilibriumDigits(train=200, hidden=16)
    method = HypergradientDescent(
        steps=30, rate=0.03, lower="fixed_point", lower_tolerance=1e-3, estimator="equilibrium",
        estimator_settings={"tolerance": 1e-3},
    )  # fmt: skip
    whole = BilevelDescent(problem, {"start": 1.0}, method)
    half = BilevelDescent(problem, {"start": 1.0}, method)
    for _ in range(15):
        assert whole.run_step()["lower_residual"] <= 1e-3
        half.run_step()
    resumed = BilevelDescent(problem, {"start": 1.0}, method)
    resumed.load_state_dict(load_checkpoint(dump_checkpoint(half)))
    for descent in (whole, resumed):
        while not descent.finished:
            descent.run_step()
    found = whole.conclude()
    assert found == resumed.conclude()
    assert found["test_accuracy"] > 0.8 and found["lower_loss"] < 1e-5
    assert found["test_iterations"] > 2  # it is no plain network


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="fixed_point"):
        HypergradientDescent(estimator="equilibrium")
    with pytest.raises(ProblemError, match="lower_map"):
        BilevelDescent(Ridge(), {"decay": {"0": 0.1, "1": 0.1, "2": 0.1}}, METHOD, Ridge().space)
    with pytest.raises(ConfigError, match="contraction"):
        EquilibriumDigits(contraction=1.0)
    with pytest.raises(ConfigError):
        AndersonAcceleration(memory=0)
