"""Hypergradients where the loss draws random numbers: the mean over several draws, each the same throughout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from raybilevel._descents.fixed_x import LagrangianPoint

PRECISION = 0.1
"""Standard error of the mean, relative to it, at which no more draws are taken."""
MOST_DRAWS = 16


def averaged(first: LagrangianPoint, another: Callable[[int], LagrangianPoint], affordable: int) -> LagrangianPoint:
    """The first estimate with the mean of the hypergradients of several draws, whose number follows from their scatter.

    another:    the estimate of a draw, 1, 2, ....
    affordable: draws that there is a budget for, the first included.
    """
    gradients = [first.gradient]
    for draw in range(1, min(MOST_DRAWS, affordable)):
        gradients.append(another(draw).gradient)
        found = torch.stack(gradients)
        if found.std(0).norm() <= PRECISION * found.mean(0).norm() * len(found) ** 0.5:
            break
    return replace(first, hypergradient=replace(first.hypergradient, gradient=torch.stack(gradients).mean(0)))
