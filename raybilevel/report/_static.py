"""Charts as SVG and PNG files, by matplotlib."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from raybilevel.report._charts import PALETTE, Chart, Series

DASHES = ("-", "--", ":", "-.")
MARKERS = "osDPX^"
TEXT = {"svg.fonttype": "none", "svg.hashsalt": "raybilevel", "font.size": 10}
"""Texts in SVG files stay texts. The fixed salt makes identifiers, and so files, the same for the same data."""


def write_figures(charts: Iterable[Chart], folder: Path) -> list[Path]:
    """Write `<name>.svg`, `<name>.png` and `<name>.csv` for each chart. Returns their paths."""
    from matplotlib import rc_context

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for chart in charts:
        figure = matplotlib_figure(chart)
        # Without a date equal data make equal files.
        for ending, metadata in (("svg", {"Date": None, "Title": chart.title, "Description": chart.alt}), ("png", {})):
            path = folder / f"{chart.name}.{ending}"
            with rc_context(TEXT):
                figure.savefig(path, dpi=150, metadata=metadata)
            written.append(path)
        path = folder / f"{chart.name}.csv"
        chart.data().to_csv(path, index=False)
        written.append(path)
    return written


def matplotlib_figure(chart: Chart) -> Any:
    """A matplotlib figure without `pyplot`, which keeps figures in a global state and may open a window."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    with rc_context(TEXT):
        height = max(2.4, 1.3 + 0.34 * len(chart.lanes)) if chart.lanes else 4.4
        figure = Figure(figsize=(7.4, height), layout="constrained")
        # The canvas that pyplot would give it.
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        if chart.surface is not None:
            s = chart.surface
            figure.colorbar(axes.contourf(s.x, s.y, s.z, levels=16, cmap="cividis"), label=s.name)
        if chart.lanes:
            axes.set_yticks(range(len(chart.lanes)), list(reversed(chart.lanes)))
            axes.set_ylim(-0.7, len(chart.lanes) - 0.3)
        for series in chart.series:
            draw(axes, series, chart)
        axes.set(xlabel=chart.x_label, ylabel=chart.y_label)
        axes.set_title(chart.title, fontsize=11)
        for axis, scale, log in (
            (axes.xaxis, axes.set_xscale, chart.x_log),
            (axes.yaxis, axes.set_yscale, chart.y_log),
        ):
            if log:
                scale("log")
                axis.set_major_formatter("{x:g}")
                low, high = axis.get_view_interval()
                axis.set_minor_formatter(sparse if math.log10(high / low) < 2.5 else NullFormatter())
        if chart.ticks:
            axes.set_xticks(range(len(chart.ticks)), chart.ticks, rotation=30 if len(chart.ticks) > 6 else 0)
        if chart.bounds is not None:
            axes.set_ylim(chart.bounds)
        axes.grid(alpha=0.3, which="both", linewidth=0.5)
        handles, names = axes.get_legend_handles_labels()
        if handles:
            figure.legend(
                handles, names, loc="outside lower center", ncols=min(4, len(handles)), frameon=False, fontsize="small"
            )
        return figure


def sparse(value: float, position: float) -> str:
    """Minor labels of a logarithmic axis: only those of 2 and 5, so that they do not overlap."""
    leading = f"{value:e}"
    return f"{value:g}" if leading.startswith(("2.000000e", "5.000000e")) else ""


def draw(axes: Any, series: Series, chart: Chart) -> None:
    from matplotlib import colormaps

    colour: Any = PALETTE[series.colour % len(PALETTE)]
    if series.shade is not None:
        colour = colormaps["cividis"](min(1.0, max(0.0, series.shade)))
    # matplotlib leaves labels that begin with "_" out of the legend.
    label = series.name if series.in_legend else "_"
    if series.kind == "spans":
        lanes = {lane: number for number, lane in enumerate(reversed(chart.lanes))}
        axes.barh(
            [lanes[lane] for lane in series.y], series.length, left=series.x, height=0.6, color=colour, label=label
        )
    elif series.kind == "points":
        marker = MARKERS[series.colour % len(MARKERS)]
        axes.errorbar(
            series.x, series.y, yerr=series.error, fmt=marker, color=colour, markersize=5, elinewidth=1, label=label
        )
    else:
        # The last value has no width, so it has a marker.
        end = {"marker": "o", "markersize": 4, "markevery": [-1]} if series.x else {}
        where = {"drawstyle": "steps-post", **end} if series.kind == "steps" else {}
        dash = DASHES[series.colour // len(PALETTE) % len(DASHES)]
        width = 2.6 if series.strong else 1.5
        axes.plot(series.x, series.y, dash, color=colour, linewidth=width, label=label, **where)
        if series.low is not None and series.high is not None:
            step = "post" if series.kind == "steps" else None
            axes.fill_between(series.x, series.low, series.high, step=step, color=colour, alpha=0.14, linewidth=0)
