"""L-BFGS on lists of tensors, as the weights of a model are."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Tensors = list[Tensor]
Merit = tuple[float, Tensors]


def minimise(merit: Callable[[Tensors], Merit], start: Tensors, max_evaluations: int, tolerance: float) -> Tensors:
    """L-BFGS with strong Wolfe line search on a merit that gives its own gradient, until that is below `tolerance`."""
    variables = [s.clone().requires_grad_(True) for s in start]
    optimizer = torch.optim.LBFGS(
        variables,
        max_iter=max_evaluations,
        max_eval=max_evaluations,
        history_size=20,
        tolerance_grad=tolerance,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> float:
        value, gradient = merit([v.detach() for v in variables])
        for variable, entry in zip(variables, gradient, strict=True):
            variable.grad = entry.to(variable.dtype)
        return value

    optimizer.step(closure)
    return [v.detach() for v in variables]


def inner(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return sum((p.double() * q.double()).sum().item() for p, q in zip(a, b, strict=True))


def norm(a: Sequence[Tensor]) -> float:
    return math.sqrt(inner(a, a))
