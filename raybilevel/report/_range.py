"""The range of an axis of losses: from the start down, so that one bad training does not squeeze all others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

from raybilevel.report._charts import Bounds, Series

MARGIN = 0.07
"""Free space at either end, as a share of the range."""
MARK = 23
"""A colour number: that of a grey triangle."""


def from_start(start: Sequence[float], values: Sequence[float], log: bool) -> Bounds | None:
    """The bounds of an axis from the median of the start to the lowest value.

    start:  losses at the start of the run.
    values: all that the axis shows.

    Returns None if the median of the start is not above the lowest value, or if no value lies above the bounds. Then
    the axis holds everything.
    """
    if not start or not values:
        return None
    low, high = min(values), median(start)
    if not low < high or (log and low <= 0):
        return None
    if log:
        margin = (high / low) ** MARGIN
        bounds = (low / margin, high * margin)
    else:
        margin = MARGIN * (high - low)
        bounds = (low - margin, high + margin)
    return bounds if max(values) > bounds[1] else None


def marks_above(bounds: Bounds, log: bool, points: Sequence[tuple[float, float, str]]) -> tuple[Series, ...]:
    """Marks at the upper end of an axis for points (x, y, note) that lie above it; no series if there are none."""
    outside = [(x, y, note) for x, y, note in points if y > bounds[1]]
    if not outside:
        return ()
    low, high = (math.log(bounds[0]), math.log(bounds[1])) if log else bounds
    edge = high - MARGIN / 2 * (high - low)
    at = math.exp(edge) if log else edge
    notes = [f"{y:.4g}, above the axis{note and f'<br>{note}'}" for _, y, note in outside]
    return (Series("above the axis", "points", [x for x, _, _ in outside], [at] * len(outside), colour=MARK,
                   notes=notes),)  # fmt: skip
