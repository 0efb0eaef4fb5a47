"""The hypergradient dF(x, y*(x))/dx by the implicit function theorem."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from raybilevel._linear.krylov import KrylovMemory, LinearSolution
from raybilevel._lower.functions import LevelGradient
from raybilevel._lower.linearisation import Products
from raybilevel.errors import NotFiniteError


@dataclass(frozen=True)
class Hypergradient:
    """An estimate of dF(x, y*(x))/dx.

    gradient:   shape (p,).
    upper:      F at the (x, y) it was taken at.
    error:      estimate of the error's norm; None where the estimator has none.
    iterations: of the linear solver, or steps in y.
    products:   with second derivatives.
    residual:   of the linear solve, relative to its right side; None where there is none.
    memory:     what the next estimate, at a point nearby, may start from.
    """

    gradient: Tensor
    upper: float
    error: float | None = None
    iterations: int = 0
    products: int = 0
    memory: Any = None
    residual: float | None = None


def implicit(
    upper: LevelGradient, products: Products, solved: LinearSolution, memory: KrylovMemory | None = None
) -> Hypergradient:
    """dF/dx - (d2f/dxdy) q, from a solution q of (d2f/dy2) q = dF/dy.

    upper:    F and its gradients at weights that minimise f.
    products: with the second derivatives of f there.
    memory:   what the solver keeps for the next system.
    """
    gradient = upper.in_x - products.mixed(solved.solution)
    # One more: the product with d2f/dxdy above.
    count = solved.products + solved.jacobians + 1
    return checked(
        Hypergradient(gradient, upper.value, solved.error, solved.iterations, count, memory, solved.residual)
    )


def checked(found: Hypergradient) -> Hypergradient:
    """The estimate, if it is finite.

    Raises:
        NotFiniteError: it is not; the rate of a series or of an unrolled descent may be too large.
    """
    if not bool(found.gradient.isfinite().all()):
        raise NotFiniteError("the hypergradient is NaN or infinite; is a learning rate too large?")
    return found
