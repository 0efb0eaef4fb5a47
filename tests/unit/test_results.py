"""A trial's report in the terms of the search."""

from __future__ import annotations

import math
from typing import Any

import pytest

from raybilevel._metric_bounds import read_bounds
from raybilevel.search import Observation
from raybilevel.space import Parameter, Space
from raybilevel.tune._results import MetricError, Objective, ran_to_its_end

SPACE = Space((Parameter(("x", "a"), 1e-2, 1.0, log=True), Parameter(("b",), 0.0, 4.0)))
UNIT = (0.5, 0.25)  # x/a = 0.1, b = 1
REPORT: dict[str, Any] = {
    "upper_loss": 0.5, "lower_loss": 0.25, "lower_passes": 3.0, "lower_level_finished": True, "score": 0.9,
    "lower_gradient": {"x": {"a": 2.0}, "b": 0.5},
}  # fmt: skip
FLAT = {**REPORT, "lower_gradient/x/a": 2.0, "lower_gradient/b": 0.5}
del FLAT["lower_gradient"]


@pytest.mark.parametrize("report", [REPORT, FLAT], ids=["nested", "flat"])
def test_a_whole_training_with_its_gradient_in_the_unit_cube(report: dict[str, Any]) -> None:
    found = Objective().observe("t", report, SPACE, UNIT)
    # df/du = df/dx dx/du: 0.1 log(100) for the first, 4 for the second
    assert found.lower_gradient == pytest.approx((2.0 * 0.1 * math.log(100), 0.5 * 4), rel=1e-12)
    assert (found.upper_loss, found.lower_loss, found.passes, found.complete) == (0.5, 0.25, 3.0, True)
    assert ran_to_its_end(report)


def test_a_gradient_that_is_not_reported_is_not_known() -> None:
    report = {**FLAT, "lower_gradient/b": math.inf}
    del report["lower_gradient/x/a"]
    missing, infinite = Objective().observe("t", report, SPACE, UNIT).lower_gradient
    assert math.isnan(missing) and not math.isfinite(infinite)


def test_a_gradient_counts_in_the_alternative_that_was_trained() -> None:
    switch = Parameter(("x",), 0.0, 1.0, choices=(0, 1), smooth=False, switch=True)
    narrow, wide = (Parameter(("x",), 0.0, high, when=(((0, i),),)) for i, high in enumerate((1.0, 10.0)))
    report = {**FLAT, "lower_gradient/x": 1.0}
    # x = 0.5, which the narrower one allows as well
    found = Objective().observe("t", report, Space((switch, narrow, wide)), (0.75, 0.5, 0.05)).lower_gradient
    assert found == pytest.approx((math.nan, math.nan, 10.0), nan_ok=True)


def test_a_maximised_metric_is_flipped_once() -> None:
    assert Objective("score", "max").observe("t", REPORT, SPACE, UNIT).upper_loss == -0.9
    assert Objective("score", "min").observe("t", REPORT, SPACE, UNIT).upper_loss == 0.9


def test_of_a_training_that_was_stopped_f_and_its_cost_count() -> None:
    report = {**REPORT, "lower_level_finished": False}
    assert Objective().observe("t", report, SPACE, UNIT) == Observation(0.5, passes=3.0, complete=False)
    assert not ran_to_its_end(report) and not ran_to_its_end({})


@pytest.mark.parametrize("missing", ["upper_loss", "lower_loss"])
def test_what_is_missing_is_named(missing: str) -> None:
    report = {name: value for name, value in REPORT.items() if name != missing}
    with pytest.raises(MetricError, match=f"trial t reported no '{missing}'") as caught:
        Objective().observe("t", report, SPACE, UNIT)
    assert caught.value.metric == missing


BOUNDS = read_bounds({"score": ">= 1", "size": "<= 2"})


def test_metrics_with_a_bound_are_observed() -> None:
    found = Objective().observe("t", {**REPORT, "size": 3.0}, SPACE, UNIT, BOUNDS)
    assert found.excesses == pytest.approx((0.1, 0.5))


def test_a_whole_training_without_a_metric_that_has_a_bound_is_an_error_and_a_stopped_one_is_not() -> None:
    with pytest.raises(MetricError, match="reported no 'size'; constraints has a bound on it: return it from evaluate"):
        Objective().observe("t", REPORT, SPACE, UNIT, BOUNDS)
    found = Objective().observe("t", {**REPORT, "lower_level_finished": False}, SPACE, UNIT, BOUNDS)
    assert found.excesses == pytest.approx((0.1, math.nan), nan_ok=True)
