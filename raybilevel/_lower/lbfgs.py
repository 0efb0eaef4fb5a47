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


def curvature(
    merit: Callable[[Tensors], Merit], at: Tensors, gradient: Tensors, along: Tensors, difference: float
) -> float:
    """<p, H p> / <p, p> of a merit with this gradient there, along a direction p, by a difference of gradients."""
    length = difference / norm(along)
    _, moved = merit([a + length * p for a, p in zip(at, along, strict=True)])
    change = [b - a for a, b in zip(gradient, moved, strict=True)]
    return inner(change, along) / length / inner(along, along)


def inner(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Summed in double precision where the device has it."""
    wide = torch.float32 if a[0].device.type == "mps" else torch.double
    return torch.stack([(p.to(wide) * q.to(wide)).sum() for p, q in zip(a, b, strict=True)]).sum().item()


def norm(a: Sequence[Tensor]) -> float:
    return math.sqrt(inner(a, a))
