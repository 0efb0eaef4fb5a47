"""Solves the lower level to a tolerance, by L-BFGS on f(x, .) from a given y."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from raybilevel._lower.functions import BothLevels, LevelGradient
from raybilevel._lower.lbfgs import minimise
from raybilevel.errors import NotFiniteError


@dataclass(frozen=True)
class LowerSolution:
    """The solution y, shape (n,), with f and its gradients there, and the iterations of L-BFGS."""

    y: Tensor
    here: LevelGradient
    iterations: int

    @property
    def value(self) -> float:
        return self.here.value

    @property
    def gradient_norm(self) -> float:
        """|df/dy|."""
        return float(self.here.in_y.norm())


def solve_lower(
    functions: BothLevels, x: Tensor, y: Tensor, tolerance: float, limit: int = 1000, history: int = 20
) -> LowerSolution:
    """Minimise f(x, .) from y by torch's L-BFGS with its Wolfe line search.

    It stops at the first point with |df/dy| <= tolerance where f is no higher than at y, or after `limit` iterations.
    The solution has the norm that was reached.

    Raises:
        NotFiniteError: f is NaN or infinite on the way.
    """
    seen: list[LevelGradient] = []  # the first and the last

    def lower(point: Tensor) -> tuple[float, Tensor]:
        seen[1:] = [functions.lower(x, point)]
        return seen[-1].value, seen[-1].in_y

    def solved(value: float, gradient: Tensor) -> bool:
        return gradient.norm().item() <= tolerance and value <= seen[0].value

    # Torch's own tolerance is on the largest entry of the gradient.
    found = minimise(lower, y, 2 * limit, 0.0, limit, history, solved)
    # L-BFGS does not say what it reached where it gave up.
    last = seen[-1]
    here = last if solved(last.value, last.in_y) else functions.lower(x, found.at)
    if not math.isfinite(here.value):
        raise NotFiniteError(f"the lower-level loss is {here.value} after {found.iterations} L-BFGS iterations")
    return LowerSolution(found.at, here, found.iterations)
