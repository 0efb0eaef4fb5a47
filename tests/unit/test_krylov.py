"""Krylov solvers and recycling against dense algebra."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import scipy.sparse.linalg
import torch
from torch import Tensor

from raybilevel._linear.krylov import KrylovMemory
from raybilevel._linear.recycling import RecycleSpace, deflation
from raybilevel.errors import NotFiniteError
from raybilevel.hypergradient import ConjugateGradients, LinearSystem, MinimalResidual, NeumannSeries, Selection

N = 60


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def matrix(low: float = 1e-3, negative: int = 0) -> Tensor:
    """Symmetric, with eigenvalues from `low` to 1 on a logarithmic scale, the smallest few turned negative."""
    basis, _ = torch.linalg.qr(torch.randn(N, N, generator=generator(1), dtype=torch.double))
    values = torch.logspace(np.log10(low), 0, N, dtype=torch.double)
    values[:negative] *= -1
    return basis * values @ basis.T


def system(h: Tensor, seed: int = 2, target: float = 0.0) -> LinearSystem:
    right = torch.randn(N, generator=generator(seed), dtype=torch.double)
    jacobian = torch.randn(7, N, generator=generator(3), dtype=torch.double)
    return LinearSystem(lambda v: h @ v, right, lambda v: jacobian @ v, target)


@pytest.mark.parametrize("solver", [ConjugateGradients(1e-10), MinimalResidual(1e-10), NeumannSeries(40_000)])
def test_solvers_solve(solver: MinimalResidual) -> None:
    h = matrix()
    given = system(h)
    found, memory = solver.solve(given, None)
    torch.testing.assert_close(found.solution, torch.linalg.solve(h, given.right), rtol=1e-6, atol=1e-6)
    again, _ = solver.solve(given, memory)
    if not isinstance(solver, NeumannSeries):  # a warm start at the solution has nothing left to do
        assert again.iterations == 0 and again.products == 1
    assert found.residual <= 1e-6


def test_conjugate_gradients_of_an_indefinite_system_end_at_the_least_residual() -> None:
    h = matrix(1e-2, negative=1)  # the curvature is negative where the iterates have grown
    given = system(h)
    found, _ = ConjugateGradients(1e-10).solve(given, None)
    true = float((given.right - h @ found.solution).norm() / given.right.norm())
    assert found.residual == pytest.approx(true, rel=1e-6) and true < 1 and 1 < found.iterations < 100
    # Any other iterate that it went through is farther.
    for limit in range(1, found.iterations):
        assert ConjugateGradients(1e-10, limit).solve(given, None)[0].residual >= found.residual - 1e-12


def test_the_residual_of_a_long_solve_is_the_true_one() -> None:
    h = matrix(1e-10)
    given = system(h)
    found, _ = MinimalResidual(1e-10).solve(given, None)
    true = float((given.right - h @ found.solution).norm() / given.right.norm())
    # By the recurrence it is a fifth of that or less.
    assert found.iterations > 50 and true > 0.1
    assert found.residual == pytest.approx(true, rel=1e-6) and found.products == found.iterations + 1


@pytest.mark.parametrize("negative", [0, 5])
def test_minres_takes_the_iterations_of_scipy(negative: int) -> None:
    h = matrix(negative=negative)
    given = system(h)
    for limit in (1, 2, 5, 17):
        mine, _ = MinimalResidual(0.0, limit=limit).solve(given, None)
        theirs, _ = scipy.sparse.linalg.minres(h.numpy(), given.right.numpy(), rtol=1e-300, maxiter=limit)
        np.testing.assert_allclose(mine.solution.numpy(), theirs, rtol=1e-8, atol=1e-10)
        true = float((given.right - h @ mine.solution).norm() / given.right.norm())
        assert mine.residual == pytest.approx(true, rel=1e-8)


@pytest.mark.parametrize("dtype", [torch.double, torch.float])
@pytest.mark.parametrize(("null", "values"), [(5, (0.5, 2.0)), (30, (-2.0, 2.1)), (58, (0.5, 2.0))])
def test_minres_stops_at_a_least_squares_solution_of_a_singular_system(
    dtype: torch.dtype, null: int, values: tuple[float, float]
) -> None:
    """H with a null space, and b not in its range; cold and from the solution before."""
    basis, _ = torch.linalg.qr(torch.randn(N, N, generator=generator(1), dtype=torch.double))
    range_, eigenvalues = basis[:, null:], torch.linspace(*values, N - null, dtype=torch.double)
    h = (range_ * eigenvalues @ range_.T).to(dtype)
    right = torch.randn(N, generator=generator(2), dtype=torch.double)
    least_squares, memory = range_.T @ right / eigenvalues, None
    residual = float((right - range_ @ (range_.T @ right)).norm() / right.norm())
    for _ in range(2):
        found, memory = MinimalResidual(1e-3).solve(LinearSystem(lambda v: h @ v, right.to(dtype), lambda v: v), memory)
        # |H r| is known to about eps^(1/2)
        tolerance = 1e-6 if dtype == torch.double else 2e-2
        error = range_.T @ found.solution.double() - least_squares
        assert float(error.norm()) <= tolerance * float(least_squares.norm())
        assert found.residual == pytest.approx(residual, rel=1e-3) and found.iterations < 200


def test_a_neumann_series_estimates_its_rate_and_reports_divergence() -> None:
    values = torch.tensor([1.0, 1.0, 3.0], dtype=torch.double)
    right = torch.tensor([1.0, 1.0, 1e-7], dtype=torch.double)  # hardly any of the direction of 3
    found, _ = NeumannSeries(100).solve(LinearSystem(lambda v: values * v, right, lambda v: v), None)
    torch.testing.assert_close(found.solution, right / values)
    with pytest.raises(NotFiniteError, match="rate"):
        NeumannSeries(100, rate=1.0).solve(LinearSystem(lambda v: values * v, right, lambda v: v), None)


@pytest.mark.parametrize("strategy", ["ritz", "harmonic_ritz", "ritz_generalized_singular"])
@pytest.mark.parametrize("end", ["smallest", "largest", "mixed"])
def test_recycled_solves_are_right_whatever_is_recycled(strategy: str, end: str) -> None:
    solver = MinimalResidual(1e-10, selection=Selection(strategy, end, dimension=8))  # type: ignore[arg-type]
    h, memory = matrix(), None
    noise = torch.randn(N, N, generator=generator(4), dtype=torch.double)
    for seed in range(5):
        h = h + 1e-5 * (noise + noise.T)
        given = system(h, seed)
        found, memory = solver.solve(given, memory)
        truth = torch.linalg.solve(h, given.right)
        assert float((found.solution - truth).norm()) <= 1e-6 * float(truth.norm())
        assert memory.space is not None and memory.space.vectors.shape == (N, 8)


def test_recycled_minres_minimises_the_residual_over_both_spaces() -> None:
    h, memory = matrix(), None
    first = MinimalResidual(0.0, limit=20, warm_start=False, selection=Selection("ritz", dimension=5))
    _, memory = first.solve(system(h, 5), None)
    assert memory.space is not None
    given = system(h, 6)
    found, _ = MinimalResidual(0.0, limit=6, warm_start=False, selection=Selection()).solve(given, memory)
    u, c = deflation(lambda v: h @ v, memory.space.vectors)
    torch.testing.assert_close(c, h @ u)
    torch.testing.assert_close(c.T @ c, torch.eye(5, dtype=torch.double))
    residual = given.right - c @ (c.T @ given.right)
    krylov = [residual]
    for _ in range(5):
        image = h @ krylov[-1]
        krylov.append(image - c @ (c.T @ image))
    basis, _ = torch.linalg.qr(torch.stack(krylov, 1))
    both = torch.cat([u, basis], 1)
    best = torch.linalg.lstsq(h @ both, given.right[:, None]).solution
    least = float((given.right - h @ both @ best[:, 0]).norm() / given.right.norm())
    true = float((given.right - h @ found.solution).norm() / given.right.norm())
    # never below the minimum over the sum of both spaces, and at it up to rounding
    assert found.residual == pytest.approx(least, rel=1e-6) and true == pytest.approx(least, rel=1e-6)


def test_selection_against_dense_decompositions() -> None:
    """With W the whole space Ritz values are eigenvalues, and generalized singular values those of J H^-1."""
    h = matrix(1e-2)
    jacobian = torch.randn(80, N, generator=generator(3), dtype=torch.double)
    w = torch.eye(N, dtype=torch.double)
    values, vectors = scipy.linalg.eigh(h.numpy())
    for strategy in ("ritz", "harmonic_ritz"):
        space, products = Selection(strategy, "smallest", 4).select(w, h, lambda v: jacobian @ v)  # type: ignore[arg-type]
        angles = scipy.linalg.subspace_angles(space.vectors.numpy(), vectors[:, :4])
        assert angles.max() < 1e-6 and products == 0
        space, _ = Selection(strategy, "largest", 4).select(w, h, lambda v: jacobian @ v)  # type: ignore[arg-type]
        assert scipy.linalg.subspace_angles(space.vectors.numpy(), vectors[:, -4:]).max() < 1e-6
    quotient = (jacobian @ torch.linalg.inv(h)).numpy()
    _, singular, right = scipy.linalg.svd(quotient, full_matrices=False)
    expected = np.linalg.solve(h.numpy(), right[:4].T)
    space, products = Selection("ritz_generalized_singular", "largest", 4).select(w, h, lambda v: jacobian @ v)
    assert scipy.linalg.subspace_angles(space.vectors.numpy(), expected).max() < 1e-6 and products == N
    residual = torch.randn(N, generator=generator(9), dtype=torch.double)
    assert space.estimator is not None
    # the whole space: the estimate is the error itself
    assert space.estimator.norm(residual) == pytest.approx(np.linalg.norm(quotient @ residual.numpy()), rel=1e-8)
    assert singular[0] > values[0]


@pytest.mark.parametrize("dtype", [torch.double, torch.float])
def test_the_null_space_of_the_hessian_is_not_recycled(dtype: torch.dtype) -> None:
    basis, _ = torch.linalg.qr(torch.randn(N, N, generator=generator(1), dtype=torch.double))
    values = torch.cat([torch.zeros(1, dtype=torch.double), torch.linspace(0.5, 2, N - 1, dtype=torch.double)])
    h = (basis * values @ basis.T).to(dtype)
    solver = MinimalResidual(1e-4, limit=25, warm_start=False, selection=Selection("ritz", dimension=5))
    right = torch.randn(N, generator=generator(2), dtype=torch.double).to(dtype)
    _, memory = solver.solve(LinearSystem(lambda v: h @ v, right, lambda v: v), None)
    assert memory.space is not None and memory.space.vectors.shape == (N, 5)
    assert deflation(lambda v: h @ v, memory.space.vectors)[0].shape == (N, 4)
    consistent = h @ right
    found, _ = solver.solve(LinearSystem(lambda v: h @ v, consistent, lambda v: v), memory)
    assert float((consistent - h @ found.solution).norm() / consistent.norm()) <= 1.1e-4


@pytest.mark.parametrize("strategy", ["ritz", "harmonic_ritz", "ritz_generalized_singular"])
@pytest.mark.parametrize("dtype", [torch.double, torch.float])
def test_few_or_no_vectors_may_be_recycled(strategy: str, dtype: torch.dtype) -> None:
    solver = MinimalResidual(1e-3, limit=1, selection=Selection(strategy, dimension=10))  # type: ignore[arg-type]
    one = torch.eye(2, dtype=dtype)[0]
    for h in (torch.zeros(2, 2, dtype=dtype), torch.eye(2, dtype=dtype).flip(0)):  # W^T H W = 0, of one vector
        memory = None
        for _ in range(2):
            given = LinearSystem(lambda v, h=h: h @ v, one, lambda v: v)
            found, memory = solver.solve(given, memory)
        assert found.solution.isfinite().all()
    # (H W)^T H W has a condition number of 1e8, more than single precision tells from a singular matrix
    h, right, memory = matrix(1e-4).to(dtype), system(matrix()).right.to(dtype), None
    for _ in range(2):
        given = LinearSystem(lambda v: h @ v, right, lambda v: v)
        found, memory = replace(solver, limit=1000, warm_start=False).solve(given, memory)
        # single precision times the condition number is 1e-3, too
        assert float((right - h @ found.solution).norm() / right.norm()) <= 5e-3
        assert memory.space is not None and memory.space.vectors.shape == (N, 10)


def test_selection_takes_no_square_matrix_of_the_upper_variables() -> None:
    """Of 500,000 variables it would take a terabyte."""
    jacobian = torch.randn(500_000, 1, generator=generator(3)).expand(-1, N)
    w, h = torch.eye(N)[:, :4], matrix().float()
    space, _ = Selection("ritz_generalized_singular", dimension=2).select(w, h @ w, lambda v: jacobian @ v)
    assert space.vectors.shape == (N, 2)


def test_the_error_criterion_stops_where_the_estimate_says() -> None:
    h = matrix(1e-2)
    selection = Selection("ritz_generalized_singular", "largest", 10)
    whole, memory = MinimalResidual(1e-10, warm_start=False, selection=selection).solve(system(h), None)
    iterations = [whole.iterations]
    for target in (1.0, 10.0):
        solver = MinimalResidual(1e-10, "error", warm_start=False, selection=selection)
        found, _ = solver.solve(system(h, target=target), memory)
        assert found.error is not None and found.error <= target
        iterations.append(found.iterations)
    assert iterations == sorted(iterations, reverse=True) and len(set(iterations)) == 3


def test_the_estimate_outside_the_basis_is_what_new_directions_had() -> None:
    h = matrix(1e-2)
    jacobian = torch.randn(7, N, generator=generator(3), dtype=torch.double)
    eye, gain = torch.eye(N, dtype=torch.double), jacobian @ torch.linalg.inv(h)
    selection = Selection("ritz_generalized_singular", "largest", 4)
    half, _ = selection.select(eye[:, :30], h[:, :30], lambda v: jacobian @ v)
    assert half.estimator is not None
    # none before: the largest of what was seen
    seen = half.estimator.weighted
    assert half.estimator.rest == pytest.approx(torch.linalg.matrix_norm(seen, 2).item())
    whole, _ = selection.select(eye, h, lambda v: jacobian @ v, half.estimator)
    assert whole.estimator is not None
    # W is all of space now, and its new half the last 30 unit vectors
    assert whole.estimator.rest == pytest.approx(torch.linalg.matrix_norm(gain[:, 30:], 2).item())
    again, _ = selection.select(eye, h, lambda v: jacobian @ v, whole.estimator)
    assert again.estimator is not None
    assert again.estimator.rest == pytest.approx(torch.linalg.matrix_norm(gain, 2).item())  # nothing new


@pytest.mark.parametrize("dtype", [torch.double, torch.float])
def test_a_right_side_of_zero_has_the_solution_zero(dtype: torch.dtype) -> None:
    zero = torch.zeros(N, dtype=dtype)
    given = LinearSystem(lambda v: v, zero, lambda v: v)
    for solver in (ConjugateGradients(), MinimalResidual(), NeumannSeries(3)):
        for memory in (None, KrylovMemory(zero + 1, RecycleSpace(torch.eye(N, dtype=dtype)[:, :2]))):
            found, kept = solver.solve(given, memory)
            assert torch.equal(found.solution, zero) and (found.residual, found.products) == (0, 0)
            assert kept.space is (memory.space if memory else None)


def test_an_exhausted_krylov_space_stops_the_solve() -> None:
    zero = torch.zeros(N, dtype=torch.double)
    # a breakdown: the first Krylov space holds the solution
    given = LinearSystem(lambda v: 2 * v, zero + 1, lambda v: v)
    found, memory = MinimalResidual(0.0, selection=Selection()).solve(given, KrylovMemory(zero))
    torch.testing.assert_close(found.solution, zero + 0.5)
    assert memory.space is not None
