"""Solvers of H q = b for a symmetric H that is known only by its products: CG, MINRES with recycling, Neumann."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from raybilevel._linear.limited_memory import LimitedMemory, Pair, Preconditioner
from raybilevel._linear.recycling import RecycleSpace, Selection, deflation
from raybilevel.errors import ConfigError, NotFiniteError

Operator = Callable[[Tensor], Tensor]

LONG = 50
"""Iterations after which the residual of MINRES's recurrence may be far below the true one (Sleijpen, van der Vorst &
Modersitzki 2000, SIAM J. Matrix Anal. Appl. 22(3)): by the square of the condition times the precision."""


@dataclass(frozen=True)
class LinearSystem:
    """The system H q = b. The caller needs only J q.

    hessian:  q, shape (n,) -> H q, H symmetric.
    right:    b, shape (n,).
    jacobian: q, shape (n,) -> J q, shape (p,).
    target:   tolerance on the norm of the error of J q; 0 to stop by the residual alone.
    accept:   replaces the stopping criterion of MINRES: it stops at the first iterate that this accepts. For
        experiments that know the solution.
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
    iterations: of the Krylov method, or terms of the series.
    products:   with H. Those of a warm start and of a recycled space count.
    jacobians:  products with J, to choose what to recycle.
    error:      estimate of |J (q - H^-1 b)|; None if the solver has no estimate.
    """

    solution: Tensor
    residual: float
    iterations: int
    products: int
    jacobians: int = 0
    error: float | None = None


@dataclass(frozen=True)
class KrylovMemory:
    """The state that one solve passes to the next."""

    solution: Tensor
    space: RecycleSpace | None = None
    recent: LimitedMemory | None = None


class LinearSolver(Protocol):
    """A frozen dataclass of settings."""

    def solve(self, system: LinearSystem, memory: KrylovMemory | None) -> tuple[LinearSolution, KrylovMemory]:
        """An approximate solution, and the memory for the next solve. memory: of the solve before, or None."""


@dataclass(frozen=True)
class ConjugateGradients:
    """The conjugate gradient method (Hestenes & Stiefel 1952), for positive definite H.

    It stops at a relative residual of `tolerance`, after `limit` iterations, or at a curvature that is not positive:
    then with the iterate that has the least residual, as those of an indefinite H may grow without bound.
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
        direction, squared, iterations = residual.clone(), residual.dot(residual).item(), 0
        least, nearest = squared, solution
        while iterations < self.limit and math.sqrt(squared) > goal:
            image = system.hessian(direction)
            iterations += 1
            curvature = direction.dot(image).item()
            if not curvature > 0:  # also if it is NaN, which says nothing about the sign of H
                squared, solution = least, nearest
                break
            length = squared / curvature
            solution = solution + length * direction
            residual = residual - length * image
            previous, squared = squared, residual.dot(residual).item()
            direction = residual + squared / previous * direction
            if squared < least:
                least, nearest = squared, solution
        relative = math.sqrt(squared) / right.norm().item()
        found = LinearSolution(solution, relative, iterations, products + iterations)
        return found, KrylovMemory(solution)


@dataclass(frozen=True)
class NeumannSeries:
    """q = rate sum_k (I - rate H)^k b, for positive definite H and a rate below 2 / |H| (Lorraine, Vicol & Duvenaud
    2020, Algorithm 3).

    rate: None for 1 / |H|, with |H| estimated by ten power iterations. Their products are counted. They start from b
        plus a fixed random vector, as b alone may have no part in the direction in which H is largest.
    """

    terms: int = 100
    rate: float | None = None

    def __post_init__(self) -> None:
        if self.terms < 1 or (self.rate is not None and not self.rate > 0):
            raise ConfigError(f"a Neumann series needs terms and a positive rate, got {self.terms} and {self.rate}")

    def solve(self, system: LinearSystem, memory: KrylovMemory | None) -> tuple[LinearSolution, KrylovMemory]:
        """See `LinearSolver`.

        Raises:
            NotFiniteError: the series diverges.
        """
        right, products = system.right, 0
        if right.norm() == 0:
            return _zero(right, memory)
        rate = self.rate
        if rate is None:
            # Drawn on the CPU, so that every device starts from the same vector.
            random = torch.randn(len(right), generator=torch.Generator().manual_seed(0)).to(right)
            vector = right / right.norm() + random / random.norm()
            vector, largest = vector / vector.norm(), 1.0
            for _ in range(10):
                image = system.hessian(vector)
                products += 1
                largest = max(image.norm().item(), torch.finfo(right.dtype).tiny)  # H may annihilate the vector
                vector = image / largest
            rate = 1 / (1.1 * largest)  # power iterations approach |H| from below
        term = rate * right
        solution = term.clone()
        for _ in range(self.terms - 1):
            term = term - rate * system.hessian(term)
            solution = solution + term
        products += self.terms - 1
        # (I - rate H)^(terms - 1) b is the residual without the last term. That of q would take one more product.
        residual = term.norm().item() / (rate * right.norm().item())
        if not residual <= 1.001:  # 1 up to rounding, where the series converges; NaN is caught as well
            raise NotFiniteError(
                f"the Neumann series diverges, with a residual of {residual:.2g} after {self.terms} terms: its rate is "
                "above 2 / |H|, or H is not positive definite; give a lower rate, or take solver 'minres'"
            )
        return LinearSolution(solution, residual, self.terms, products), KrylovMemory(solution)


class _Solve(NamedTuple):
    """A solve of MINRES.

    krylov: Krylov vectors, each with its product with H.
    met:    whether the criterion ended it.
    """

    found: LinearSolution
    memory: KrylovMemory
    krylov: list[Pair]
    met: bool


class _Iterate(NamedTuple):
    """An iterate of MINRES.

    projected: |(I - C C^T) H r|.
    solution:  q without its part in span(U).
    inner:     minus the coefficients of that part, shape (k,).
    residual:  r, shape (n,); norm: |r|.
    """

    projected: float
    solution: Tensor
    inner: Tensor
    residual: Tensor
    norm: float


@dataclass(frozen=True)
class MinimalResidual:
    """MINRES (Paige & Saunders 1975), for symmetric H. With a `selection` it recycles a subspace.

    Recycling is RMINRES (Wang, de Sturler & Paulino 2007), with the strategies and the criterion of Ehrhardt, Gazzola &
    Scott, arXiv:2412.08264.

    Let C = H U with C^T C = I. The start is corrected so that r = (I - C C^T)(b - H q_0). MINRES then runs on
    (I - C C^T) H in the complement of C, and q = q_0 + U C^T r_0 + V z - U C^T H V z.

    Suppose H is singular and b is not in its range, as with more weights than examples and no decay. The iterates first
    approach a least-squares solution, H r = 0. Then they grow without bound in the null space of H, while the residual
    of the recurrence keeps falling. |H r| is known from the recurrence (Choi, Paige & Saunders 2011, SIAM J. Sci.
    Comput. 33(4)). Their test, |H r| <= tolerance |H| |r|, would also stop solves that have yet to find a small
    eigenvalue: |H r| has a minimum before that, of about the root of the eigenvalue over |H|. So the iterate with the
    least |H r| must have |H r| <= 3 eps^(1/2) |H| |r|. It is then the solution if |H r| has grown a hundredfold since,
    or if the true residual has not fallen by a tenth since.

    tolerance:  stop at this relative residual.
    criterion:  "residual", or "error": stop when the estimate of |J (q - H^-1 b)| is below the system's target. Without
        a target or an estimate "error" falls back to the residual.
    limit:      stop after this many iterations.
    selection:  what to recycle in the next system; None for nothing. "auto": the last Krylov vectors, as a
        preconditioner, where that has paid (`LimitedMemory`). If such a solve misses the tolerance it is done again
        without.
    """

    tolerance: float = 1e-6
    criterion: str = "residual"
    limit: int = 1000
    warm_start: bool = True
    selection: Selection | Literal["auto"] | None = "auto"

    def __post_init__(self) -> None:
        if self.criterion not in ("residual", "error"):
            raise ConfigError(f"criterion must be 'residual' or 'error', got {self.criterion!r}")
        if isinstance(self.selection, str) and self.selection != "auto":
            raise ConfigError(f"selection must be the settings of one, 'auto' or None, got {self.selection!r}")
        estimates = isinstance(self.selection, Selection) and self.selection.estimates_error
        if self.criterion == "error" and not estimates:
            raise ConfigError("criterion='error' needs a selection by Ritz generalized singular vectors")

    def solve(self, system: LinearSystem, memory: KrylovMemory | None) -> tuple[LinearSolution, KrylovMemory]:
        if system.right.norm() == 0:
            return _zero(system.right, memory)
        if self.selection != "auto":
            solve = self._solve(system, memory)
            return solve.found, solve.memory
        recent = (memory.recent if memory is not None else None) or LimitedMemory()
        preconditioner = recent.preconditioner()
        solve = self._solve(system, memory, preconditioner)
        if preconditioner is None or solve.met:
            recent = recent.after(solve.krylov, solve.found.iterations, preconditioner is not None, solve.met)
            return solve.found, replace(solve.memory, recent=recent)
        missed, solve = solve.found, self._solve(system, memory)
        recent = replace(
            recent.after(solve.krylov, solve.found.iterations, False, solve.met), worth=False, in_doubt=False
        )
        iterations, products = missed.iterations + solve.found.iterations, missed.products + solve.found.products
        found = replace(solve.found, iterations=iterations, products=products)
        return found, replace(solve.memory, recent=recent)

    def _solve(
        self, system: LinearSystem, memory: KrylovMemory | None, preconditioner: Preconditioner | None = None
    ) -> _Solve:
        right, selection = system.right, self.selection if isinstance(self.selection, Selection) else None
        solution, residual, products = _start(system, memory if self.warm_start else None)
        scale = right.norm().item()
        space = memory.space if memory is not None and selection is not None else None
        # Without a recycled space U and C are (n, 0): their products vanish, and this is plain MINRES.
        u, c = (right.new_zeros(len(right), 0),) * 2
        if space is not None:
            u, c = deflation(system.hessian, space.vectors)
            products += space.vectors.shape[1]
            # q_0 + U C^T r_0, whose residual is r = (I - C C^T) r_0.
            inner = c.T @ residual  # (k,)
            solution, residual = solution + u @ inner, residual - c @ inner

        def error(r: Tensor) -> float | None:
            return None if space is None or space.estimator is None else space.estimator.norm(r)

        def done(q: Tensor, t: Tensor, r: Tensor, norm: float) -> bool:
            if system.accept is not None:
                return system.accept(q - u @ t)
            estimate = error(r) if self.criterion == "error" and system.target > 0 else None
            return estimate <= system.target if estimate is not None else norm <= self.tolerance * scale

        # Notation of Choi, Paige & Saunders 2011, Algorithm MINRES; `size` is an estimate of |H|. With a preconditioner
        # P the Lanczos vectors have <v, P v> = 1, H is multiplied with `along` = P v, and phi is <r, P r>^(1/2).
        along, beta = _applied(preconditioner, residual)
        phi, norm = beta, residual.norm().item()
        if beta > 0:
            along = along / beta
        vector = along if preconditioner is None else residual / beta
        before = d1 = d2 = torch.zeros_like(right)
        t1 = t2 = t_sum = right.new_zeros(c.shape[1])
        cosine, sine, delta, epsilon = -1.0, 0.0, 0.0, 0.0
        best, size, singular, lost = _Iterate(math.inf, solution, t_sum, residual, phi), 0.0, False, False
        # The first Lanczos vectors to select from, or the last to precondition with. Each takes the memory of two more
        # weight vectors.
        krylov: deque[Pair] = deque(maxlen=LimitedMemory.capacity(len(right)) if self.selection == "auto" else None)
        iterations, met = 0, False
        while iterations < self.limit and beta > 0 and not (met := done(solution, t_sum, residual, norm)):
            image = system.hessian(along)
            iterations += 1
            inner = c.T @ image
            if self.selection == "auto" or (selection is not None and len(krylov) < selection.most_vectors):
                krylov.append(Pair(along, image))
            # Lanczos on (I - C C^T) H: the tridiagonal matrix gets the column (beta, alpha, next beta).
            p = image - c @ inner
            p = p - c @ (c.T @ p)  # again: one projection leaves a part in C, of the size of rounding
            alpha = along.dot(p).item()
            p = p - alpha * vector - (beta * before if iterations > 1 else 0)
            ahead, beta = _applied(preconditioner, p)
            # The rotation of the step before, applied to this column.
            delta2 = cosine * delta + sine * alpha
            gamma = sine * delta - cosine * alpha
            epsilon_next, delta = sine * beta, -cosine * beta
            gamma2 = math.hypot(gamma, beta)
            if preconditioner is None:
                size, projected = max(size, math.hypot(alpha, beta)), phi * math.hypot(gamma, delta)
                if projected <= best.projected:
                    best = _Iterate(projected, solution, t_sum, residual, phi)  # of the iterate before this step
                singular = best.projected <= 3 * math.sqrt(torch.finfo(right.dtype).eps) * size * best.norm
                lost = singular and projected > 100 * best.projected
            if lost or gamma2 == 0:
                break
            # The rotation of this step leaves an upper triangular matrix, R. phi is the norm of the residual after it.
            cosine, sine = gamma / gamma2, beta / gamma2
            tau, phi = cosine * phi, sine * phi
            # Columns of V R^-1, the newest first: the iterate moves along d1. t1 and t2 are the same for C^T H V.
            d1, d2 = (along - delta2 * d1 - epsilon * d2) / gamma2, d1
            t1, t2 = (inner - delta2 * t1 - epsilon * t2) / gamma2, t1
            epsilon = epsilon_next
            solution, t_sum = solution + tau * d1, t_sum + tau * t1
            # The next Lanczos vector is rounding noise: the Krylov space is exhausted.
            if beta <= 1e-14 * abs(alpha):
                residual = sine**2 * residual
                norm = residual.norm().item()
                break
            before, along = vector, ahead / beta
            vector = along if preconditioner is None else p / beta
            # r_k = s_k^2 r_(k-1) - phi_k c_k v_(k+1)
            residual = sine**2 * residual - phi * cosine * vector
            norm = phi if preconditioner is None else residual.norm().item()
        if singular and not lost:
            # phi comes from the recurrence, which does not see the growth in the null space.
            true = (right - system.hessian(solution - u @ t_sum)).norm().item()
            products, lost = products + 1, not true <= 0.9 * best.norm
        if lost:
            _, solution, t_sum, residual, norm = best
        solution = solution - u @ t_sum
        if iterations > LONG:
            residual = right - system.hessian(solution)
            products, norm = products + 1, residual.norm().item()
        met = not lost and (met or norm <= self.tolerance * scale)
        estimate, kept, jacobians = error(residual), space, 0
        # What the next system recycles.
        if selection is not None and krylov:
            w = torch.cat([u, torch.stack([pair.vector for pair in krylov], 1)], 1)
            hw = torch.cat([c, torch.stack([pair.image for pair in krylov], 1)], 1)
            chosen, jacobians = selection.select(w, hw, system.jacobian, space.estimator if space else None)
            kept = chosen or space  # nothing can be chosen if H annihilates all of W
        found = LinearSolution(solution, norm / scale, iterations, products + iterations, jacobians, estimate)
        return _Solve(found, KrylovMemory(solution, kept), list(krylov), met)


def _applied(preconditioner: Preconditioner | None, residual: Tensor) -> tuple[Tensor, float]:
    """P r and <r, P r>^(1/2)."""
    if preconditioner is None:
        return residual, residual.norm().item()
    applied = preconditioner(residual)
    return applied, math.sqrt(max(0.0, residual.dot(applied).item()))


def _zero(right: Tensor, memory: KrylovMemory | None) -> tuple[LinearSolution, KrylovMemory]:
    """The solution of H q = 0, whose relative residual would be 0 / 0. What is recycled is kept."""
    zero = torch.zeros_like(right)
    kept = KrylovMemory(zero) if memory is None else replace(memory, solution=zero)
    return LinearSolution(zero, 0.0, 0, 0), kept


def _start(system: LinearSystem, memory: KrylovMemory | None) -> tuple[Tensor, Tensor, int]:
    """The first iterate, its residual, and the number of products with H."""
    if memory is None:
        return torch.zeros_like(system.right), system.right.clone(), 0
    return memory.solution.clone(), system.right - system.hessian(memory.solution), 1
