"""The lower level solved to a tolerance: L-BFGS on f(x, .) from a given y."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from raybilevel.errors import NotFiniteError
from raybilevel.hypergradient._functions import BilevelFunctions


@dataclass(frozen=True)
class LowerSolution:
    """y, shape (n,), with f and |df/dy| there; iterations of L-BFGS."""

    y: Tensor
    value: float
    gradient_norm: float
    iterations: int


def solve_lower(
    functions: BilevelFunctions, x: Tensor, y: Tensor, tolerance: float, limit: int = 1000, history: int = 20
) -> LowerSolution:
    """Minimise f(x, .) from y until |df/dy| <= tolerance, by torch's L-BFGS with its Wolfe line search, or for `limit`
    iterations; the solution has the norm that was reached.

    Raises:
        NotFiniteError: f is NaN or infinite on the way.
    """
    point = y.detach().clone().requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [point],
        max_iter=limit,
        max_eval=2 * limit,
        history_size=history,
        # torch compares the largest entry; divided by sqrt(n), it bounds the norm too early at most by that factor
        tolerance_grad=tolerance / math.sqrt(len(y)),
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        lower = functions.lower(x, point)
        point.grad = lower.in_y
        return torch.tensor(lower.value, dtype=y.dtype)

    optimizer.step(closure)
    iterations = int(optimizer.state[point]["n_iter"])
    here = functions.lower(x, point.detach())
    if not math.isfinite(here.value):
        raise NotFiniteError(f"the lower-level loss is {here.value} after {iterations} L-BFGS iterations")
    return LowerSolution(point.detach(), here.value, here.in_y.norm().item(), iterations)
