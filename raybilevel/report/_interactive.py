"""Charts as plotly figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from raybilevel.report._charts import PALETTE, Chart, Series

DASHES = ("solid", "dash", "dot", "dashdot")
END_SIZE = 7
"""Of the marker at the end of steps, in pixels."""
MARKERS = ("circle", "square", "diamond", "cross", "x", "triangle-up")


def plotly_figure(chart: Chart) -> Any:
    """A plotly figure. Its background is transparent, so that it fits the page in light and dark mode."""
    figure = go.Figure()
    height = max(240, 150 + 30 * len(chart.lanes)) if chart.lanes else 420
    if chart.surface is not None:
        s = chart.surface
        figure.add_trace(
            go.Contour(x=s.x, y=s.y, z=s.z, colorscale="Cividis", colorbar={"title": {"text": s.name}}, name=s.name)
        )
    everything = [y for s in chart.series for y in s.y]
    for series in chart.series:
        for trace in traces(series):
            figure.add_trace(trace)
    figure.update_layout(
        xaxis={**axis(chart.x_label, chart.x_log, [x for s in chart.series for x in s.x]), "automargin": True},
        yaxis={**axis(chart.y_label, chart.y_log, chart.bounds or everything), "automargin": True},
        # At the top there is room for the toolbar, which would cover data.
        margin={"l": 60, "r": 16, "t": 36, "b": 48},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        template="none",
        barmode="overlay",
        hovermode="closest",
        # 70 pixels below the plot, of whose height plotly takes shares.
        legend={"orientation": "h", "y": -70 / (height - 84), "yanchor": "top"},
        height=height,
    )
    # Plotly counts categories upwards, lanes go from top to bottom.
    if chart.lanes:
        figure.update_yaxes(
            categoryorder="array", categoryarray=list(reversed(chart.lanes)), type="category", automargin=True
        )
    if chart.ticks:
        figure.update_xaxes(tickvals=list(range(len(chart.ticks))), ticktext=list(chart.ticks))
    if chart.bounds is not None:
        # Plotly takes the exponents of a logarithmic axis.
        figure.update_yaxes(range=[math.log10(bound) if chart.y_log else bound for bound in chart.bounds])
    return figure


def axis(label: str, log: bool, values: Sequence[Any]) -> dict[str, Any]:
    """An axis. A logarithmic one has labels at 1, 2 and 5, at powers of ten if it is long, or the default if short."""
    found: dict[str, Any] = {"title": {"text": label, "standoff": 8}, "zeroline": False}
    if not log:
        return found
    decades = math.log10(max(values) / min(values)) if values and min(values) > 0 else 0.0
    step = {} if decades < 0.7 else {"dtick": "D2" if decades < 3 else 1}
    form = {"exponentformat": "power"} if decades >= 3 else {"tickformat": "~g"}  # 0.2 and 0.5, not 2 and 5
    return {**found, "type": "log", **form, **step}


def traces(series: Series) -> list[Any]:
    """The traces of a series: its own, after those of the band around it."""
    colour = colour_of(series)
    shown = {"legendgroup": series.name, "showlegend": series.in_legend, "name": series.name}
    hover = {"hovertext": series.notes, "hovertemplate": hover_text(series)}
    if series.kind == "spans":
        bar = go.Bar(
            y=series.y, x=series.length, base=series.x, orientation="h", marker={"color": colour}, **shown, **hover
        )
        return [bar]
    if series.kind == "points":
        marker = {"color": colour, "size": 9, "symbol": MARKERS[series.colour % len(MARKERS)]}
        error = None if series.error is None else {"type": "data", "array": series.error, "color": colour}
        return [go.Scatter(x=series.x, y=series.y, mode="markers", marker=marker, error_y=error, **shown, **hover)]
    # "hv" stays level until the next x.
    shape = "hv" if series.kind == "steps" else "linear"
    line = {"color": colour, "width": 3 if series.strong else 1.8, "shape": shape, "dash": dash_of(series)}
    found = []
    if series.low is not None and series.high is not None:
        # "tonexty" fills down to the trace before, so the lower edge comes first.
        edge = {"width": 0, "shape": shape, "color": colour}
        quiet = {"legendgroup": series.name, "showlegend": False, "hoverinfo": "skip", "mode": "lines"}
        found.append(go.Scatter(x=series.x, y=series.low, line=edge, **quiet))
        found.append(go.Scatter(x=series.x, y=series.high, line=edge, fill="tonexty", fillcolor=faded(colour), **quiet))
    if series.kind == "steps":
        # The last value has no width. Its marker shows it, and the axis leaves room for markers.
        marker = {"color": colour, "size": [0] * (len(series.x) - 1) + [END_SIZE], "line": {"width": 0}}
        found.append(
            go.Scatter(x=series.x, y=series.y, mode="lines+markers", line=line, marker=marker, **shown, **hover)
        )
        return found
    found.append(go.Scatter(x=series.x, y=series.y, mode="lines", line=line, **shown, **hover))
    return found


def hover_text(series: Series) -> str:
    x = "%{base:.4g} + %{x:.4g}" if series.kind == "spans" else "%{x:.4g}"
    y = "%{y}" if series.kind == "spans" else "%{y:.5g}"
    words = "<br>%{hovertext}" if series.notes is not None else ""
    return f"{series.name}<br>{x}, {y}{words}<extra></extra>"


def colour_of(series: Series) -> str:
    if series.shade is not None:
        return str(sample_colorscale("Cividis", [min(1.0, max(0.0, series.shade))])[0])
    return PALETTE[series.colour % len(PALETTE)]


def dash_of(series: Series) -> str:
    return DASHES[series.colour // len(PALETTE) % len(DASHES)]


def faded(colour: str) -> str:
    """A colour of the palette, or "rgb(r, g, b)", at 15 % opacity."""
    if colour.startswith("#"):
        red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
        return f"rgba({red},{green},{blue},0.15)"
    return colour.replace("rgb(", "rgba(").replace(")", ",0.15)")
