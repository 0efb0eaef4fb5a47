"""Torch's L-BFGS on a merit that gives its own gradient."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from raybilevel._lower.linearisation import inner, norm

Merit = Callable[[Tensor], tuple[float, Tensor]]
"""A value and its gradient at a vector."""


class Minimum(NamedTuple):
    """Where a minimisation ended, and after how many iterations."""

    at: Tensor
    iterations: int


class _Enough(Exception):  # noqa: N818  not an error: how torch's optimizer is stopped within a line search
    """A point is good enough."""


def minimise(
    merit: Merit,
    start: Tensor,
    max_evaluations: int,
    tolerance: float,
    max_iterations: int | None = None,
    history: int = 20,
    enough: Callable[[float, Tensor], bool] | None = None,
) -> Minimum:
    """L-BFGS with strong Wolfe line search from a vector, until no entry of the gradient is above `tolerance`, or until
    `enough` of a value and a gradient: then at the last point that the merit was asked for."""
    variable = start.detach().clone().requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [variable],
        max_iter=max_evaluations if max_iterations is None else max_iterations,
        max_eval=max_evaluations,
        history_size=history,
        tolerance_grad=tolerance,
        # Torch's own 1e-9 is absolute: in the units of the merit and of its variables.
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> float:
        value, gradient = merit(variable.detach())
        if enough is not None and enough(value, gradient):
            raise _Enough
        variable.grad = gradient.to(variable)
        return value

    with contextlib.suppress(_Enough):  # torch leaves the variable where the merit was asked for
        optimizer.step(closure)
    return Minimum(variable.detach(), int(optimizer.state[variable]["n_iter"]))


def curvature(merit: Merit, at: Tensor, gradient: Tensor, along: Tensor, difference: float) -> float:
    """<p, H p> / <p, p> of a merit with this gradient there, along a direction p, by a difference of gradients."""
    length = difference / norm(along)
    # moved - gradient is H p times `length`.
    _, moved = merit(at + length * along)
    return inner(moved - gradient, along) / length / inner(along, along)
