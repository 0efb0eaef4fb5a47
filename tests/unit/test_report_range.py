"""Axes of losses that a bad training does not squeeze."""

from __future__ import annotations

import pytest

pytest.importorskip("plotly", reason="the extra `report` is not installed")

from raybilevel.report._charts import Chart
from raybilevel.report._interactive import plotly_figure
from raybilevel.report._range import from_start, marks_above


def test_the_axis_goes_from_the_lowest_value_to_the_median_of_the_start() -> None:
    start, values = [3.0, 2.0, 90.0], [3.0, 2.0, 90.0, 1.0]
    # A range of 2 with 7 % of it free at either end.
    assert from_start(start, values, log=False) == pytest.approx((0.86, 3.14))
    low, high = from_start(start, values, log=True) or (0.0, 0.0)
    assert low == pytest.approx(1 / 3**0.07) and high == pytest.approx(3 * 3**0.07)


@pytest.mark.parametrize(
    ("start", "values"),
    [
        ([], [1.0, 2.0]),
        ([2.0], []),
        ([1.0], [1.0, 9.0]),  # nothing was better than the start
        ([3.0], [1.0, 3.1]),  # all fits
    ],
)
def test_without_an_outlier_or_a_gain_the_axis_holds_everything(start: list[float], values: list[float]) -> None:
    assert from_start(start, values, log=False) is None


@pytest.mark.parametrize("log", [False, True])
def test_what_lies_above_the_axis_is_marked_at_its_end(log: bool) -> None:
    bounds = (1.0, 4.0)
    (marks,) = marks_above(bounds, log, [(1.0, 3.0, "a"), (2.0, 70.0, "b")])
    assert marks.x == [2.0] and 3.7 < marks.y[0] < 4.0
    assert marks.notes == ["70, above the axis<br>b"]
    assert marks_above(bounds, log, [(1.0, 3.0, "a")]) == ()
    chart = Chart("n", "t", "c", "alt", "x", "y", (marks,), y_log=log, bounds=bounds)
    # Plotly takes logarithms.
    assert plotly_figure(chart).layout.yaxis.range == pytest.approx((0.0, 0.60206) if log else bounds, abs=1e-5)
