"""The optimistic lower level: of all minimisers of f at fixed x, the one with the lowest F."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from raybilevel.lbfgs import Merit, Tensors, inner, minimise, norm
from raybilevel.levels import Levels

DECREASE = 0.05
"""The first multiplier would let a Cauchy step lower F by this share of |F|."""


def lower_upper_level(
    levels: Levels, hyperparameters: Mapping[str, Any], max_passes: float, tolerance: float = 1e-3
) -> None:
    """Move trained weights y to where F is lowest among the minimisers of f:  min_y F(y)  s.t.  f(x, y) <= v.

    By an exterior penalty: F + m f is descended with m growing tenfold until m (f - v), by which its minimum lies below
    that of the constrained problem at most, is `tolerance` |F|; then f alone, until df/dy is as small as it was. Where
    the minimiser of f is unique, that ends where it began. The weights stay as they are if F ends no lower.

    max_passes: gradient evaluations of f this may cost.
    """
    begun, price = levels.passes, levels.evaluation_passes()
    weights = [w for w in levels.model.parameters() if w.requires_grad]
    trained = [w.detach().clone() for w in weights]

    def left(share: float = 1.0) -> int:
        """Evaluations of both levels that are left of a share of the passes."""
        return int((share * max_passes - (levels.passes - begun)) / price)

    def place(move: Tensors) -> None:
        with torch.no_grad():
            for weight, start, step in zip(weights, trained, move, strict=True):
                weight.copy_(start + step)

    def upper(move: Tensors) -> Merit:
        place(move)
        found = levels.gradient("upper", {}, weights)
        return found.value, list(found.gradient)

    def lower(move: Tensors) -> Merit:
        place(move)
        found = levels.gradient("lower", hyperparameters, weights)
        return found.value, list(found.gradient)

    def penalised(multiplier: float) -> Callable[[Tensors], Merit]:
        def merit(move: Tensors) -> Merit:
            (high, slope), (low, force) = upper(move), lower(move)
            return high + multiplier * low, [a + multiplier * b for a, b in zip(slope, force, strict=True)]

        return merit

    move: Tensors = [torch.zeros_like(w) for w in trained]
    difference = math.sqrt(torch.finfo(trained[0].dtype).eps) * (norm(trained) or 1.0)
    high, slope = upper(move)
    low, force = lower(move)
    still = max(g.abs().max().item() for g in force)
    if norm(slope) == 0:
        return
    scale = abs(high) or 1.0
    chance = torch.Generator().manual_seed(0)
    noise = [torch.randn(w.shape, generator=chance, dtype=torch.double).to(w) for w in trained]
    # Of f, the mean curvature: along dF/dy it may have none.
    bent = max(_curvature(lower, move, force, direction, difference) for direction in (noise, slope))
    multiplier = inner(slope, slope) / (max(bent, 1e-12) * DECREASE * scale)
    while True:
        merit = penalised(multiplier)
        aim = tolerance * max(g.abs().max().item() for g in slope)
        move = _descend(merit, move, left(0.8), aim, difference)
        value, _ = lower(move)
        low = min(low, value)
        if multiplier * (value - low) <= tolerance * scale or left(0.8) < 3:
            break
        multiplier *= 10
    move = _descend(lower, move, left(), still, difference)
    if not upper(move)[0] < high:
        place([torch.zeros_like(w) for w in trained])


def _curvature(
    merit: Callable[[Tensors], Merit], at: Tensors, gradient: Tensors, direction: Tensors, difference: float
) -> float:
    """<p, H p> / <p, p> along a direction p, by a difference of gradients."""
    length = difference / norm(direction)
    _, moved = merit([a + length * p for a, p in zip(at, direction, strict=True)])
    change = [b - a for a, b in zip(gradient, moved, strict=True)]
    return inner(change, direction) / length / inner(direction, direction)


def _descend(
    merit: Callable[[Tensors], Merit], start: Tensors, max_evaluations: int, tolerance: float, difference: float
) -> Tensors:
    """L-BFGS in units of a Cauchy step and what it gains, so that all it sees is of order one."""
    value, gradient = merit(start)
    squared = inner(gradient, gradient)
    if max_evaluations < 3 or max(g.abs().max().item() for g in gradient) <= tolerance:
        return start
    curvature = _curvature(merit, start, gradient, gradient, difference)
    if not curvature > 0:
        curvature = math.sqrt(squared) / difference
    step, gain = math.sqrt(squared) / curvature, squared / curvature

    def scaled(variables: Tensors) -> Merit:
        found, slope = merit([s + step * v for s, v in zip(start, variables, strict=True)])
        return (found - value) / gain, [g * (step / gain) for g in slope]

    ended = minimise(scaled, [torch.zeros_like(s) for s in start], max_evaluations - 2, tolerance * step / gain)
    return [s + step * v for s, v in zip(start, ended, strict=True)]
