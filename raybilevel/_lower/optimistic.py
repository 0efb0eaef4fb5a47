"""The optimistic lower level: of all minimisers of f at fixed x, the one with the lowest F."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch

from raybilevel._lower.lbfgs import Merit, Tensors, curvature, inner, minimise, norm
from raybilevel._lower.levels import Levels
from raybilevel.errors import NotFiniteError

logger = logging.getLogger(__name__)

DECREASE = 0.05
"""The first multiplier would let a Cauchy step lower F by this share of |F|."""


def select_minimiser(
    levels: Levels, hyperparameters: Mapping[str, Any], max_passes: float, tolerance: float = 1e-2
) -> bool:
    """Move the trained weights y_i to where F is lowest among the minimisers of f:

        min_y F(y)   subject to   f~(y) <= f~(y_i),    f~(y) = f(x, y) - <df/dy(x, y_i), y - y_i>,

    f~ being f where the training reached a stationary point, and having one at y_i where it did not. By an exterior
    penalty: F + m f~ is descended, m growing tenfold until m (f~(y) - f~(y_i)), by which its minimum lies below the
    constrained one at most, is `tolerance` |F|; then f~ alone, with what is left. Where y_i is the only minimiser that
    ends where it began.

    max_passes: gradient evaluations of f that this may cost.
    Returns whether the weights were moved: they are left as they were if F ends no lower, or if the constraint does not
        hold in the end, because f~ has lower values nearby, a loss is not finite, or `max_passes` are spent; that is
        logged.
    """
    search = _Search(levels, hyperparameters, max_passes)
    upper, slope = search.upper(search.start)
    if norm(slope) == 0:
        return False
    size = abs(upper) or 1.0
    try:
        bent = search.curvature(slope)
    except (NotFiniteError, _Spent):
        search.place(search.start)
        return search.gave_up()
    multiplier = inner(slope, slope) / (max(bent, 1e-12) * DECREASE * size)
    aim = tolerance * max(g.abs().max().item() for g in slope)
    move = search.start
    while True:
        move, lower, ended = search.descend(multiplier, move, aim, 0.8)
        violation = multiplier * lower
        if not ended or violation <= tolerance * size:
            break
        multiplier *= 10
    if not -tolerance * size <= violation <= tolerance * size:
        search.place(search.start)
        return search.gave_up()
    polished, _, _ = search.descend(None, move, 0.0, 1.0)
    search.place(polished)
    found = levels.value("upper", {})
    if found < upper:
        return True
    search.place(search.start)
    return False if ended else search.gave_up()


class _Spent(Exception):  # noqa: N818  not an error: how a descent is ended
    """The passes are spent."""


class _Search:
    """F and f~ as functions of the displacement from the trained weights, within a number of passes."""

    def __init__(self, levels: Levels, hyperparameters: Mapping[str, Any], max_passes: float) -> None:
        self.levels, self.hyperparameters = levels, hyperparameters
        self.begun, self.max_passes = levels.passes, max_passes
        self.limit = max_passes
        self.weights = [w for w in levels.model.parameters() if w.requires_grad]
        self.trained = [w.detach().clone() for w in self.weights]
        self.start: Tensors = [torch.zeros_like(w) for w in self.trained]
        self.difference = math.sqrt(torch.finfo(self.trained[0].dtype).eps) * (norm(self.trained) or 1.0)
        here = levels.gradient("lower", hyperparameters, self.weights)
        self.lowest, self.tilt = here.value, list(here.gradient)

    def place(self, move: Tensors) -> None:
        with torch.no_grad():
            for weight, start, step in zip(self.weights, self.trained, move, strict=True):
                weight.copy_(start + step)

    def upper(self, move: Tensors) -> Merit:
        self.place(move)
        found = self.levels.gradient("upper", {}, self.weights)
        return found.value, list(found.gradient)

    def lower(self, move: Tensors) -> Merit:
        """f~ less f~ at the trained weights."""
        if self.levels.passes - self.begun >= self.limit:
            raise _Spent
        self.place(move)
        found = self.levels.gradient("lower", self.hyperparameters, self.weights)
        value = found.value - self.lowest - inner(self.tilt, move)
        return value, [g - t for g, t in zip(found.gradient, self.tilt, strict=True)]

    def curvature(self, slope: Tensors) -> float:
        """Of f~: along dF/dy it may have none, so the mean over all directions where that is larger."""
        chance = torch.Generator().manual_seed(0)
        noise = [torch.randn(w.shape, generator=chance, dtype=torch.double).to(w) for w in self.trained]
        return max(curvature(self.lower, self.start, self.start, along, self.difference) for along in (noise, slope))

    def descend(
        self, multiplier: float | None, start: Tensors, aim: float, share: float
    ) -> tuple[Tensors, float, bool]:
        """L-BFGS on F + m f~, or on f~ alone where m is None, in units of a Cauchy step and what it gains, so that all
        it sees is of order one. Where it was when it had to end, after a share of all passes or at a loss that is not
        finite, f~ there less f~ at the trained weights, and whether it ended by itself."""
        self.limit = share * self.max_passes
        best = (math.inf, start, 0.0)
        scale: tuple[float, float] | None = None
        value = 0.0

        def merit(move: Tensors) -> Merit:
            nonlocal best
            lower, force = self.lower(move)
            total, gradient = lower, force
            if multiplier is not None:
                upper, slope = self.upper(move)
                total = upper + multiplier * lower
                gradient = [a + multiplier * b for a, b in zip(slope, force, strict=True)]
            if total < best[0]:
                best = (total, move, lower)
            return total, gradient

        def scaled(variables: Tensors) -> Merit:
            assert scale is not None
            step, gain = scale
            found, gradient = merit([s + step * v for s, v in zip(start, variables, strict=True)])
            return (found - value) / gain, [g * (step / gain) for g in gradient]

        ended = False
        try:
            value, gradient = merit(start)
            squared = inner(gradient, gradient)
            if max(g.abs().max().item() for g in gradient) <= aim:
                ended = True
            else:
                bent = curvature(merit, start, gradient, gradient, self.difference)
                if not bent > 0:
                    bent = math.sqrt(squared) / self.difference
                scale = (math.sqrt(squared) / bent, squared / bent)
                tolerance = aim * scale[0] / scale[1]
                minimise(scaled, [torch.zeros_like(s) for s in start], int(self.max_passes) + 1, tolerance)
                ended = True
        except (_Spent, NotFiniteError):
            pass
        return best[1], best[2], ended

    def gave_up(self) -> bool:
        logger.warning(
            "no minimiser of f with a lower F was found within %.0f gradient evaluations, so the trained weights are "
            "kept; train for longer, or to a point where df/dy is smaller", self.max_passes,
        )  # fmt: skip
        return False
