"""Figures of one run, from real searches in this process."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from raybilevel._config.experiment import ExperimentConfig, SearchConfig
from raybilevel._lower.paired import Gain
from raybilevel._records.record import Record
from raybilevel._records.run_folder import record_of, settings_of
from raybilevel.methods import make_method
from raybilevel.problems.ridge import Ridge
from raybilevel.report import _result as tables
from raybilevel.report import _search as figures
from raybilevel.report import _single as single
from raybilevel.report._charts import Chart, Series
from raybilevel.report._interactive import plotly_figure
from raybilevel.report._page import Section, drawing, render
from raybilevel.report._sources import Source
from raybilevel.report._static import matplotlib_figure
from raybilevel.report._tables import Table
from raybilevel.search import _state_file as state_file
from raybilevel.search._local import search
from raybilevel.search._optimizer import BilevelOptimizer
from raybilevel.search_state import Proposal, SearchState, Training
from raybilevel.space import Parameter, Space


@functools.cache
def record(groups: int, cost: int = 9) -> Record:
    problem = Ridge(groups)
    optimizer = BilevelOptimizer(problem.space, make_method("default"), seed=0)
    search(problem, optimizer, cost)
    saved = state_file.SavedSearch(
        **vars(optimizer.saved()), metric="upper_loss", mode="min", constants="{}", checkpoints={}
    )
    config = ExperimentConfig(problem="ridge", search=SearchConfig(trainings=cost, method="default"))
    return record_of(settings_of(config), saved, {}, {})


@pytest.fixture(scope="module", params=[1, 2, 5])
def drawn(request: pytest.FixtureRequest) -> tuple[Record, dict[str, Chart]]:
    found = record(request.param)
    kinds = (single.charts, single.inside_charts, single.cost_charts)
    return found, {chart.name: chart for kind in kinds for chart in kind(found)}


def test_every_figure_of_a_search_is_there_and_told_in_words(drawn: tuple[Record, dict[str, Chart]]) -> None:
    found, charts = drawn
    shape = "parallel" if len(found.space) > 2 else "value-function"
    assert {"progress", "path", "predictions", shape, "importance", "multipliers", "errors", "cost"} == set(charts)
    for chart in charts.values():
        assert chart.alt and chart.caption and chart.x_label + chart.y_label
        assert not chart.data().empty
        for series in chart.series:
            assert len(series.x) == len(series.y) > 0


def test_figures_show_what_was_trained(drawn: tuple[Record, dict[str, Chart]]) -> None:
    found, charts = drawn
    done = [o for o in found.observations if o.upper_loss is not None]
    best = next(s for s in charts["progress"].series if s.name == "best so far")
    assert best.y == pytest.approx([min(o.upper_loss for o in done[: i + 1]) for i in range(len(done))])
    chart = charts["progress"]
    points = [y for s in chart.series if s.kind == "points" and s.name != "above the axis" for y in s.y]
    assert sorted(points) == pytest.approx(sorted(o.upper_loss for o in done))
    split = {s.name: s.length[0] for s in charts["cost"].series if s.length}
    assert split["trainings"] == len(done)
    assert sum(split.values()) == pytest.approx(found.observations[-1].cost, abs=1e-6)
    above = [y for y in points if chart.bounds is not None and y > chart.bounds[1]]
    marked = [y for s in chart.series if s.name == "above the axis" for y in s.y]
    assert len(marked) == len(above) and all(y <= chart.bounds[1] for y in marked if chart.bounds)
    result, hyperparameters = tables.tables(found)
    losses = dict(zip(result.headers, next(row for row in result.plain_rows if "result" in row[0]), strict=True))
    assert float(losses["F (validation loss)"]) == pytest.approx(best.y[-1], rel=1e-4)
    values = found.observations[found.observations[-1].incumbent].hyperparameters["decay"]
    told = {row[0].removeprefix("decay/"): float(row[1]) for row in hyperparameters.plain_rows}
    assert told == {name: pytest.approx(value, rel=1e-3) for name, value in values.items()}
    assert {row[4] for row in hyperparameters.rows} == {"0.0001 to 10"}
    shares = [float(row[2].rstrip("%")) for row in hyperparameters.rows]
    assert shares == sorted(shares, reverse=True) and sum(shares) == pytest.approx(100, abs=len(shares))


def test_the_slice_goes_through_what_was_trained() -> None:
    chart = next(c for c in single.charts(record(1)) if c.name == "value-function")
    curve, trained = chart.series[0], chart.series[1]
    assert chart.x_log and curve.low is not None and curve.high is not None
    for x, y in zip(trained.x, trained.y, strict=True):
        near = min(range(len(curve.x)), key=lambda i: abs(curve.x[i] / x - 1))
        # 101 points on five decades: the nearest is 6 % away at most, along which f changes by no more than this.
        assert curve.y[near] == pytest.approx(y, abs=0.03 * (max(trained.y) - min(trained.y)) + 1e-9)
    assert all(low <= high for low, high in zip(curve.low, curve.high, strict=True))


def test_the_contour_has_the_paths_of_the_trust_regions() -> None:
    chart = next(c for c in single.charts(record(2)) if c.name == "value-function")
    assert chart.surface is not None and len(chart.surface.z) == len(chart.surface.y)
    paths = [s for s in chart.series if s.kind == "line"]
    trained = set(zip(chart.series[0].x, chart.series[0].y, strict=True))
    assert paths and all(set(zip(p.x, p.y, strict=True)) <= trained for p in paths)


def test_hyperparameters_without_a_scale_are_drawn_by_their_places() -> None:
    kernel, degree = (
        Parameter.of(("kernel",), "choice", ["linear", "poly"]),
        Parameter.of(("degree",), "randint", [1, 6]),
    )
    for parameters in ((kernel, replace(degree, when=(((0, 1),),))), (kernel,)):
        chart = next(c for c in search_charts(parameters) if c.name == "parallel")
        notes = {note for series in chart.series for note in series.notes or ()}
        assert {"kernel = linear", "kernel = poly"} <= notes
        assert len(parameters) == 1 or {"degree = 5", "degree = -"} <= notes


def test_whole_numbers_have_their_own_values_on_an_axis() -> None:
    layers, decay = Parameter.of(("layers",), "randint", [1, 6]), Parameter.of(("decay",), "loguniform", [1e-3, 1.0])
    (line,) = [c for c in search_charts((layers,)) if c.name == "value-function"]
    (plane,) = [c for c in search_charts((layers, decay)) if c.name == "value-function"]
    assert line.series[0].x == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert plane.surface is not None and plane.surface.x == [1.0, 2.0, 3.0, 4.0, 5.0]


def search_charts(parameters: tuple[Parameter, ...]) -> list[Chart]:
    """Figures of a search at five points of the diagonal of the unit cube."""
    space = Space(parameters)
    points = [space.rounded(torch.full((space.dimension,), n / 4, dtype=torch.double)).tolist() for n in range(5)]
    trainings = tuple(
        Training(n, Proposal(tuple(point), "start"), "done", n, lower_loss=float(n), upper_loss=n + 1.0,
                 lower_gradient=(math.nan,) * space.dimension)
        for n, point in enumerate(points)
    )  # fmt: skip
    saved = BilevelOptimizer(space, make_method("default"), seed=0).saved()
    return figures.charts(
        state_file.SavedSearch(
            **{**vars(saved), "state": SearchState(trainings)},
            metric="upper_loss", mode="min", constants="{}", checkpoints={},
        )
    )  # fmt: skip


def test_the_best_of_a_search_with_constraints_keeps_them() -> None:
    found = record(2)
    lowest = min(range(len(found.observations)), key=lambda i: found.observations[i].upper_loss or math.inf)
    marked = tuple(o.model_copy(update={"feasible": i != lowest}) for i, o in enumerate(found.observations))
    constrained = found.model_copy(update={"observations": marked})
    assert lowest not in single.running_lowest(constrained)[lowest:] and lowest in single.running_lowest(found)
    assert len(tables.improvements(constrained).rows) == len(tables.improvements(found).rows) - 1
    for best, words in ((lowest, "It breaks the constraints."), (lowest - 1, "It keeps the constraints.")):
        ended = marked[-1].model_copy(update={"incumbent": best})
        shown = constrained.model_copy(update={"observations": (*marked[:-1], ended)})
        assert words in tables.result(shown).note
    assert "constraints" not in tables.result(found).note


def test_the_table_of_results_has_the_gain_with_its_standard_error() -> None:
    found = record(2).model_copy(update={"gain": Gain("upper_loss", 0.3413, 0.0214, 90)})
    table = tables.result(found)
    assert table.headers == ("", "F (validation loss)")
    assert ("gain over the start", "0.341 ± 0.021") in table.rows
    assert "F lower by 0.341 ± 0.021 over 90 validation examples, beyond two standard errors." in table.note
    of_another = record(2).model_copy(update={"gain": Gain("test_loss", 0.3413, 0.0214, 90)})
    assert ("gain over the start", "-") in tables.result(of_another).rows
    assert "gain over the start" not in [row[0] for row in tables.result(record(2)).rows]


def test_the_table_of_results_has_the_best_shared_value() -> None:
    found = record(2)
    best, start = found.observations[-1].incumbent, found.start
    shared = next(i for i in range(len(found.observations)) if i not in (best, start))
    gain = Gain("upper_loss", 0.25, 0.0214, 90)
    found = found.model_copy(update={"shared": shared, "gain_over_shared": gain})
    table = tables.result(found)
    names = [row[0].partition(" (")[0] for row in table.rows]
    assert names[:5] == [
        "start",
        "best shared value tried",
        "result",
        "against the start",
        "gain over the shared value",
    ]
    assert table.rows[4][1] == "0.250 ± 0.021"
    # The start is one itself: one row, one gain.
    table = tables.result(found.model_copy(update={"shared": start}))
    assert not any("shared" in row[0] for row in table.rows)


def test_on_a_phone_a_row_of_many_columns_is_a_list_with_their_names() -> None:
    source = Source("run", Path("run"), [record(2)], [])
    page = render(source, [Section("Result", (), [wide(columns=5, rows=2), wide(columns=5, rows=7)])], drawing())
    assert page.count('<table class="wide">') == 1
    assert page.count('<td data-head="column 1">') == 9
    assert '<td data-head="column 2" class="none">-</td>' in page
    assert "weight_<wbr>decay/<wbr>a" in page  # where a line may break


def wide(columns: int, rows: int) -> Table:
    cells = ("weight_decay/a", "1.5", "-", *("2.5" for _ in range(columns - 3)))
    return Table(f"table-{rows}", "Table", tuple(f"column {i}" for i in range(columns)), (cells,) * rows)


def test_the_last_step_has_a_marker_as_it_has_no_width() -> None:
    series = Series("best so far", "steps", [1.0, 2.0, 3.0], [3.0, 2.0, 1.0])
    chart = Chart("name", "title", "caption", "alt", "x", "y", (series,))
    (trace,) = plotly_figure(chart).data
    assert trace.mode == "lines+markers"
    assert [bool(size) for size in trace.marker.size] == [False, False, True]
    (line,) = matplotlib_figure(chart).axes[0].lines
    assert (line.get_marker(), line.get_markevery()) == ("o", [-1])
