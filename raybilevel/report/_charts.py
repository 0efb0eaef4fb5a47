"""The content of figures, independent of the library that draws them: values, names, labels and alternative texts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import pandas as pd

Kind = Literal["steps", "line", "points", "spans"]
Bounds = tuple[float, float]
"""Of an axis, in its own unit: the lower one, then the upper one."""

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c564b", "#7f7f7f")
"""Okabe and Ito's colours, which colour-blind readers can tell apart; yellow, unreadable on white, is replaced."""


@dataclass(frozen=True)
class Series:
    """One named series of a chart.

    kind:      "steps" (constant until the next x), "line", "points", or "spans" (bars from x to x + length in lane y).
    low, high: the bounds of a band around y.
    error:     half the length of error bars in y.
    length:    of each span, in x.
    colour:    number in the palette.
    shade:     place on a colour scale, from 0 to 1, instead of a colour.
    strong:    whether it is drawn thicker than the others.
    notes:     a text for each point, shown under the pointer.
    """

    name: str
    kind: Kind
    x: list[Any]
    y: list[Any]
    low: list[float] | None = None
    high: list[float] | None = None
    error: list[float] | None = None
    length: list[float] | None = None
    colour: int = 0
    shade: float | None = None
    strong: bool = False
    notes: list[str] | None = None
    in_legend: bool = True


@dataclass(frozen=True)
class Surface:
    """Values over a grid, drawn as filled contours. z has a row for each y."""

    name: str
    x: list[float]
    y: list[float]
    z: list[list[float]]


@dataclass(frozen=True)
class Chart:
    """A figure.

    name:    of its files, without the ending.
    caption: what the figure shows and how to read it.
    alt:     alternative text: what is seen, for readers who cannot see it.
    ticks:   names at x = 0, 1, ... instead of numbers.
    lanes:   names on the y axis from top to bottom, for spans.
    bounds:  of the y axis.
    """

    name: str
    title: str
    caption: str
    alt: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    surface: Surface | None = None
    x_log: bool = False
    y_log: bool = False
    ticks: tuple[str, ...] = ()
    lanes: tuple[str, ...] = ()
    bounds: Bounds | None = field(default=None)

    def data(self) -> pd.DataFrame:
        """All data of the figure, one row per point."""
        parts = []
        for series in self.series:
            columns = {"series": [series.name] * len(series.x), "x": series.x, "y": series.y}
            for name in ("low", "high", "error", "length", "notes"):
                values = getattr(series, name)
                if values is not None:
                    columns[name] = values
            if series.shade is not None:
                columns["shade"] = [series.shade] * len(series.x)
            parts.append(pd.DataFrame(columns))
        if self.surface is not None:
            s = self.surface
            cells = [(s.name, x, y, z) for y, row in zip(s.y, s.z, strict=True) for x, z in zip(s.x, row, strict=True)]
            parts.append(pd.DataFrame(cells, columns=["series", "x", "y", "z"]))
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["series", "x", "y"])
