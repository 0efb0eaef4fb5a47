"""The optimistic lower level: of all minimisers of f at fixed x, the one with the lowest F."""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor

from raybilevel._lower.functions import finite
from raybilevel._lower.lbfgs import curvature, minimise
from raybilevel._lower.levels import Levels
from raybilevel._lower.linearisation import difference, inner, norm
from raybilevel._lower.variables import set_weights
from raybilevel.errors import NotFiniteError

logger = logging.getLogger(__name__)

DECREASE = 0.05
"""The first multiplier would let a Cauchy step lower F by this share of |F|."""


def select_minimiser(levels: Levels, x: Tensor, max_passes: float, tolerance: float = 1e-2) -> bool:
    """Move the trained weights y_i to where F is lowest among the minimisers of f:

        min_y F(y)   subject to   f~(y) <= f~(y_i),    f~(y) = f(x, y) - <df/dy(x, y_i), y - y_i>,

    f~ being f where the training reached a stationary point, and having one at y_i where it did not. By an exterior
    penalty: F + m f~ is descended, m growing tenfold until m (f~(y) - f~(y_i)), by which its minimum lies below the
    constrained one at most, is `tolerance` |F|; then f~ alone, with what is left. Where y_i is the only minimiser that
    ends where it began.

    max_passes: gradient evaluations of f that this may cost.
    Returns whether the model's weights were moved: they are left as they were if F ends no lower, or if the constraint
        does not hold in the end, because f~ has lower values nearby, a loss is not finite, or `max_passes` are spent;
        that is logged.
    """
    search = _Search(levels, x, max_passes)
    upper, slope = search.upper(search.start)
    # F does not depend on y, so all minimisers are equally good.
    if norm(slope) == 0:
        return False
    size = abs(upper) or 1.0
    try:
        bent = search.curvature(slope)
    except (NotFiniteError, _Spent):
        return search.gave_up()
    # A Cauchy step on F + m f~ from y_i, where df~/dy is 0, is dF/dy / (m bent). It lowers F by |dF/dy|^2 / (m bent).
    multiplier = inner(slope, slope) / (max(bent, 1e-12) * DECREASE * size)
    aim = tolerance * slope.abs().max().item()
    move = search.start
    # The exterior penalty, with four fifths of the passes. The last fifth is for f~ alone.
    while True:
        move, lower, ended = search.descend(multiplier, move, aim, 0.8)
        violation = multiplier * lower
        if not ended or violation <= tolerance * size:
            break
        multiplier *= 10
    # Below the interval, f~ has values under the one that y_i was taken to minimise.
    if not -tolerance * size <= violation <= tolerance * size:
        return search.gave_up()
    # The minimiser of F + m f~ lies beside the minimisers of f~ at every finite m. This goes back to one of them.
    polished, _, _ = search.descend(None, move, 0.0, 1.0)
    if finite("upper", levels.value("upper", x, search.trained + polished)) < upper:
        set_weights(levels.model, search.trained + polished)
        return True
    return False if ended else search.gave_up()


class _Spent(Exception):  # noqa: N818  not an error: how a descent is ended
    """The passes are spent."""


class _Search:
    """F and f~ as functions of the displacement from the trained weights, within a number of passes."""

    def __init__(self, levels: Levels, x: Tensor, max_passes: float) -> None:
        self.levels, self.x = levels, x
        self.begun, self.max_passes = levels.passes, max_passes
        self.limit = max_passes
        self.trained = levels.y
        self.start = torch.zeros_like(self.trained)
        here = levels.lower(x, self.trained)
        self.lowest, self.tilt = finite("lower", here.value), here.in_y

    def upper(self, move: Tensor) -> tuple[float, Tensor]:
        found = self.levels.upper(self.x, self.trained + move)
        return finite("upper", found.value), found.in_y

    def lower(self, move: Tensor) -> tuple[float, Tensor]:
        """f~ less f~ at the trained weights."""
        if self.levels.passes - self.begun >= self.limit:
            raise _Spent
        found = self.levels.lower(self.x, self.trained + move)
        return finite("lower", found.value) - self.lowest - inner(self.tilt, move), found.in_y - self.tilt

    def curvature(self, slope: Tensor) -> float:
        """Of f~: along dF/dy it may have none, so the mean over all directions where that is larger."""
        chance = torch.Generator().manual_seed(0)
        # Drawn on the CPU in double precision, so that every device and dtype has the same direction.
        noise = torch.randn(self.trained.shape, generator=chance, dtype=torch.double).to(self.trained)
        apart = difference(self.trained)
        return max(curvature(self.lower, self.start, self.start, along, apart) for along in (noise, slope))

    def descend(self, multiplier: float | None, start: Tensor, aim: float, share: float) -> tuple[Tensor, float, bool]:
        """L-BFGS on F + m f~, or on f~ alone where m is None, in units of a Cauchy step and what it gains, so that all
        it sees is of order one. Where it was when it had to end, after a share of all passes or at a loss that is not
        finite, f~ there less f~ at the trained weights, and whether it ended by itself."""
        self.limit = share * self.max_passes
        # The lowest point seen, as the passes may be spent in the middle of a line search.
        best = (math.inf, start, 0.0)
        scale: tuple[float, float] | None = None
        value = 0.0

        def merit(move: Tensor) -> tuple[float, Tensor]:
            nonlocal best
            lower, force = self.lower(move)
            total, gradient = lower, force
            if multiplier is not None:
                upper, slope = self.upper(move)
                total, gradient = upper + multiplier * lower, slope + multiplier * force
            if total < best[0]:
                best = (total, move, lower)
            return total, gradient

        def scaled(variables: Tensor) -> tuple[float, Tensor]:
            assert scale is not None
            step, gain = scale
            found, gradient = merit(start + step * variables)
            return (found - value) / gain, gradient * (step / gain)

        ended = False
        try:
            value, gradient = merit(start)
            squared = inner(gradient, gradient)
            if gradient.abs().max().item() <= aim:
                ended = True
            else:
                apart = difference(self.trained)
                bent = curvature(merit, start, gradient, gradient, apart)
                # Not convex along the gradient. The first step is then as long as the difference that showed it.
                if not bent > 0:
                    bent = math.sqrt(squared) / apart
                scale = (math.sqrt(squared) / bent, squared / bent)
                tolerance = aim * scale[0] / scale[1]
                # The number of evaluations is no limit: each takes a pass or more, so `_Spent` comes first.
                minimise(scaled, torch.zeros_like(start), int(self.max_passes) + 1, tolerance)
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
