"""Linear systems H q = b with a symmetric H known by its products: CG, MINRES, Neumann series, recycled MINRES."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from raybilevel._linear.recycling import RecycleSpace, Selection, deflation
from raybilevel.errors import ConfigError, NotFiniteError

Operator = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LinearSystem:
    """H q = b, of which only J q is wanted.

    hessian:  q, shape (n,) -> H q, H symmetric.
    right:    b, shape (n,).
    jacobian: q, shape (n,) -> J q, shape (p,).
    target:   the error of J q that is small enough, in its norm; 0 to go by the residual alone.
    accept:   tried on each iterate of MINRES, which ends where it holds, whatever the criterion; for measurements that
        know the solution.
    """

    hessian: Operator
    right: Tensor
    jacobian: Operator
    target: float = 0.0
    accept: Callable[[Tensor], bool] | None = None


@dataclass(frozen=True)
class LinearSolution:
    """An approximate solution.

    residual:   |b - H q| / |b|.
    iterations: of the Krylov method (terms of the series).
    products:   with H, those of a warm start and of a recycled space included.
    jacobians:  products with J, which the choice of a recycled space may need.
    error:      estimate of |J (q - H^-1 b)|; None where there is none.
    negative:   whether it ended at a negative curvature, which shows that H is not positive semidefinite.
    """

    solution: Tensor
    residual: float
    iterations: int
    products: int
    jacobians: int = 0
    error: float | None = None
    negative: bool = False


@dataclass(frozen=True)
class KrylovMemory:
    """What one solve leaves for the next."""

    solution: Tensor
    space: RecycleSpace | None = None


class LinearSolver(Protocol):
    """A frozen dataclass of settings."""

    def solve(self, system: LinearSystem, memory: KrylovMemory | None) -> tuple[LinearSolution, KrylovMemory]:
        """An approximate solution, and what the next solve may start from."""


@dataclass(frozen=True)
class ConjugateGradients:
    """The conjugate gradient method (Hestenes & Stiefel 1952), for positive definite H.

    It ends at a relative residual of `tolerance`, after `limit` iterations, or where the curvature is not positive.
    """

    tolerance: float = 1e-6
    limit: int = 1000
    warm_start: bool = True

    def solve(self, system: LinearSystem, memory: KrylovMemory | None) -> tuple[LinearSolution, KrylovMemory]:
        right = system.right
        if right.norm() == 0:
            return _zero(right, memory)
        solution, residual, products = _start(system, memory if self.warm_start else None)
        goal = self.tolerance * right.norm().item()
        direction, squared, iterations, negative = residual.clone(), residual.dot(residual).item(), 0, False
        while iterations < self.limit and math.sqrt(squared) > goal:
            image = system.hessian(direction)
            iterations += 1
            curvature = direction.dot(image).item()
            if not curvature > 0:
                negative = curvature < 0
                break
            length = squared / curvature
            solution = solution + length * direction
            residual = residual - length * image
            previous, squared = squared, residual.dot(residual).item()
            direction = residual + squared / previous * direction
        relative = math.sqrt(squared) / right.norm().item()
        found = LinearSolution(solution, relative, iterations, products + iterations, negative=negative)
        return found, KrylovMemory(solution)


@dataclass(frozen=True)
class NeumannSeries:
    """q = rate sum_k (I - rate H)^k b, for positive definite H and a rate below 2 / |H| (Lorraine, Vicol & Duvenaud
    2020, Algorithm 3).

    rate: None for the reciprocal of an estimate of |H| by ten power iterations, which are charged. They start from b
        and a random vector, the same each time, as b alone may lack the direction in which H is largest.
    """

    terms: int = 100
    rate: float | None = None

    def __post_init__(self) -> None:
        if self.terms < 1 or (self.rate is not None and not self.rate > 0):
            raise ConfigError(f"a Neumann series needs terms and a positive rate, got {self.terms} and {self.rate}")

    def solve(self, system: LinearSystem, memory: KrylovMemory | None) -> tuple[LinearSolution, KrylovMemory]:
        """As every solver does.

        Raises:
            NotFiniteError: the series diverges.
        """
        right, products = system.right, 0
        if right.norm() == 0:
            return _zero(right, memory)
        rate = self.rate
        if rate is None:
            random = torch.randn(len(right), generator=torch.Generator().manual_seed(0)).to(right)
            vector = right / right.norm() + random / random.norm()
            vector, largest = vector / vector.norm(), 1.0
            for _ in range(10):
                image = system.hessian(vector)
                products += 1
                largest = max(image.norm().item(), torch.finfo(right.dtype).tiny)
                vector = image / largest
            rate = 1 / (1.1 * largest)
        term = rate * right
        solution = term.clone()
        for _ in range(self.terms - 1):
            term = term - rate * system.hessian(term)
            solution = solution + term
        products += self.terms - 1
        residual = term.norm().item() / (rate * right.norm().item())
        if not residual <= 1.001:  # but for rounding, 1
            raise NotFiniteError(
                f"the Neumann series diverges, with a residual of {residual:.2g} after {self.terms} terms: its rate is "
                "above 2 / |H|, or H is not positive definite; give a lower rate, or take solver 'minres'"
            )
        return LinearSolution(solution, residual, self.terms, products), KrylovMemory(solution)


class _Iterate(NamedTuple):
    """One of MINRES: |(I - C C^T) H r|, q without its part in U, that part's coefficients with minus, r, and |r|."""

    projected: float
    solution: Tensor
    inner: Tensor
    residual: Tensor
    norm: float


@dataclass(frozen=True)
class MinimalResidual:
    """MINRES (Paige & Saunders 1975), for symmetric H, with a recycled subspace where a selection is given (RMINRES:
    Wang, de Sturler & Paulino 2007; strategies and criterion of Ehrhardt, Gazzola & Scott, arXiv:2412.08264).

    With U and C = H U, C^T C = I, the start is corrected to r = (I - C C^T)(b - H q_0), MINRES runs on
    (I - C C^T) H in the complement of C, and q = q_0 + U C^T r_0 + V z - U C^T H V z.

    Where H is singular and b not in its range, as with more weights than examples and no decay, the iterates approach a
    least-squares solution, H r = 0, and then grow without bound along what H annihilates, while the residual of the
    recurrence falls on. |H r| is known from the recurrence (Choi, Paige & Saunders 2011, SIAM J. Sci. Comput. 33(4)).
    Their test, |H r| <= tolerance |H| |r|, would also end solves that have yet to find a small eigenvalue, before which
    |H r| passes a minimum of about the root of that eigenvalue over |H|. So here the iterate of the least |H r| is the
    solution if that was at most 3 eps^(1/2) |H| |r| and has grown a hundredfold since, or if the residual, computed
    anew at the end, has not fallen since.

    tolerance:  it ends at this relative residual,
    criterion:  "residual", or "error": it ends where the estimate of |J (q - H^-1 b)| is below the system's target,
        where there is a target and an estimate; otherwise at the residual.
    limit:      or after this many iterations.
    selection:  what to keep of one system for the next; None for nothing.
    flat:       or where the curvature along the residual, <r, H r> / |r|^2, is no more than this share of the largest
        seen: there H is flat, and the iterate a least-squares solution, or not convex, and the iterate a descent
        direction of <q, H q> / 2 - <b, q>. It is known from the recurrence (Liu & Roosta 2022, SIAM J. Optim. 32(4)).
        None for no such end.
    """

    tolerance: float = 1e-6
    criterion: str = "residual"
    limit: int = 1000
    warm_start: bool = True
    selection: Selection | None = None
    flat: float | None = None

    def __post_init__(self) -> None:
        if self.criterion not in ("residual", "error"):
            raise ConfigError(f"criterion must be 'residual' or 'error', got {self.criterion!r}")
        if self.criterion == "error" and (self.selection is None or not self.selection.estimates_error):
            raise ConfigError("criterion='error' needs a selection by Ritz generalized singular vectors")

    def solve(self, system: LinearSystem, memory: KrylovMemory | None) -> tuple[LinearSolution, KrylovMemory]:
        right = system.right
        if right.norm() == 0:
            return _zero(right, memory)
        solution, residual, products = _start(system, memory if self.warm_start else None)
        scale = right.norm().item()
        space = memory.space if memory is not None and self.selection is not None else None
        u, c = (right.new_zeros(len(right), 0),) * 2
        if space is not None:
            u, c = deflation(system.hessian, space.vectors)
            products += space.vectors.shape[1]
            inner = c.T @ residual
            solution, residual = solution + u @ inner, residual - c @ inner

        def error(r: Tensor) -> float | None:
            return None if space is None or space.estimator is None else space.estimator.norm(r)

        def done(q: Tensor, t: Tensor, r: Tensor, norm: float) -> bool:
            if system.accept is not None:
                return system.accept(q - u @ t)
            estimate = error(r) if self.criterion == "error" and system.target > 0 else None
            return estimate <= system.target if estimate is not None else norm <= self.tolerance * scale

        # Notation of Choi, Paige & Saunders 2011, Algorithm MINRES; `size` is an estimate of |H|.
        beta = phi = residual.norm().item()
        vector = residual / beta if beta > 0 else residual
        before = d1 = d2 = torch.zeros_like(right)
        t1 = t2 = t_sum = right.new_zeros(c.shape[1])
        cosine, sine, delta, epsilon = -1.0, 0.0, 0.0, 0.0
        best, size, singular, lost = _Iterate(math.inf, solution, t_sum, residual, phi), 0.0, False, False
        steepest, negative = 0.0, False
        basis: list[Tensor] = []
        images: list[Tensor] = []
        iterations = 0
        while iterations < self.limit and beta > 0 and not done(solution, t_sum, residual, phi):
            image = system.hessian(vector)
            iterations += 1
            inner = c.T @ image
            if self.selection is not None and len(basis) < self.selection.most_vectors:
                basis.append(vector)
                images.append(image)
            p = image - c @ inner
            p = p - c @ (c.T @ p)
            alpha = vector.dot(p).item()
            p = p - alpha * vector - (beta * before if iterations > 1 else 0)
            beta = p.norm().item()
            delta2 = cosine * delta + sine * alpha
            gamma = sine * delta - cosine * alpha
            epsilon_next, delta = sine * beta, -cosine * beta
            gamma2 = math.hypot(gamma, beta)
            size, projected = max(size, math.hypot(alpha, beta)), phi * math.hypot(gamma, delta)
            if self.flat is not None:
                curvature = -cosine * gamma
                steepest = max(steepest, abs(curvature))
                if curvature <= self.flat * steepest:
                    negative = curvature < -self.flat * steepest
                    break
            if projected <= best.projected:
                best = _Iterate(projected, solution, t_sum, residual, phi)
            # Where a flat H ends the solve, no other sign of it is needed.
            smallest = 0.0 if self.flat is not None else 3 * math.sqrt(torch.finfo(right.dtype).eps) * size
            singular = best.projected <= smallest * best.norm
            lost = singular and projected > 100 * best.projected
            if lost or gamma2 == 0:
                break
            cosine, sine = gamma / gamma2, beta / gamma2
            tau, phi = cosine * phi, sine * phi
            d1, d2 = (vector - delta2 * d1 - epsilon * d2) / gamma2, d1
            t1, t2 = (inner - delta2 * t1 - epsilon * t2) / gamma2, t1
            epsilon = epsilon_next
            solution, t_sum = solution + tau * d1, t_sum + tau * t1
            # A Lanczos vector of rounding noise only: the Krylov space is exhausted.
            if beta <= 1e-14 * abs(alpha):
                residual = sine**2 * residual
                break
            before, vector = vector, p / beta
            residual = sine**2 * residual - phi * cosine * vector
        if singular and not lost:
            true = (right - system.hessian(solution - u @ t_sum)).norm().item()
            products, lost = products + 1, not true <= 0.9 * best.norm
        if lost:
            _, solution, t_sum, residual, phi = best
        solution = solution - u @ t_sum
        estimate, kept, jacobians = error(residual), space, 0
        if self.selection is not None and basis:
            w, hw = torch.cat([u, torch.stack(basis, 1)], 1), torch.cat([c, torch.stack(images, 1)], 1)
            chosen, jacobians = self.selection.select(w, hw, system.jacobian, space.estimator if space else None)
            kept = chosen or space
        return (
            LinearSolution(solution, phi / scale, iterations, products + iterations, jacobians, estimate, negative),
            KrylovMemory(solution, kept),
        )


def _zero(right: Tensor, memory: KrylovMemory | None) -> tuple[LinearSolution, KrylovMemory]:
    """Of H q = 0, to which no residual is relative; the recycled space is kept."""
    zero = torch.zeros_like(right)
    return LinearSolution(zero, 0.0, 0, 0), KrylovMemory(zero, memory.space if memory is not None else None)


def _start(system: LinearSystem, memory: KrylovMemory | None) -> tuple[Tensor, Tensor, int]:
    """The first iterate, its residual, and how many products it took."""
    if memory is None:
        return torch.zeros_like(system.right), system.right.clone(), 0
    return memory.solution.clone(), system.right - system.hessian(memory.solution), 1
