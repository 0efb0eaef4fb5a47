"""Solves the lower level to a tolerance, by L-BFGS on f(x, .) from a given y."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from raybilevel._lower.functions import BothLevels
from raybilevel._lower.lbfgs import minimise
from raybilevel.errors import NotFiniteError


@dataclass(frozen=True)
class LowerSolution:
    """The solution y, shape (n,), with f and |df/dy| there, and the iterations of L-BFGS."""

    y: Tensor
    value: float
    gradient_norm: float
    iterations: int


def solve_lower(
    functions: BothLevels, x: Tensor, y: Tensor, tolerance: float, limit: int = 1000, history: int = 20
) -> LowerSolution:
    """Minimise f(x, .) from y by torch's L-BFGS with its Wolfe line search.

    It stops at |df/dy| <= tolerance or after `limit` iterations. The solution has the norm that was reached.

    Raises:
        NotFiniteError: f is NaN or infinite on the way.
    """

    def lower(point: Tensor) -> tuple[float, Tensor]:
        found = functions.lower(x, point)
        return found.value, found.in_y

    # torch compares the largest entry of the gradient, which is at least the norm divided by sqrt(n).
    found = minimise(lower, y, 2 * limit, tolerance / math.sqrt(len(y)), limit, history)
    # L-BFGS does not say what it reached, nor whether it gave up.
    here = functions.lower(x, found.at)
    if not math.isfinite(here.value):
        raise NotFiniteError(f"the lower-level loss is {here.value} after {found.iterations} L-BFGS iterations")
    return LowerSolution(found.at, here.value, here.in_y.norm().item(), found.iterations)
