from __future__ import annotations

from typing import Any

import pytest

from raybilevel._metric_bounds import MetricBound, as_written, read_bounds
from raybilevel.errors import ConfigError


def test_bounds_are_in_the_order_of_their_metrics_and_written_as_they_are_read() -> None:
    written = {"recall": ">= 0.9", "latency_ms": "<=5e0"}
    bounds = read_bounds(written)
    assert bounds == (MetricBound("latency_ms", "<=", 5.0), MetricBound("recall", ">=", 0.9))
    assert as_written(bounds) == {"latency_ms": "<= 5", "recall": ">= 0.9"}
    assert read_bounds(as_written(bounds)) == bounds
    assert read_bounds(None) == read_bounds({}) == ()


@pytest.mark.parametrize(
    ("text", "value", "excess"),
    [("<= 5", 6.0, 0.2), ("<= 5", 4.0, -0.2), (">= 0.5", 0.25, 0.5), (">= 0", -3.0, 3.0), (">= -2", -3.0, 0.5)],
)
def test_the_excess_is_in_units_of_the_bound(text: str, value: float, excess: float) -> None:
    (bound,) = read_bounds({"m": text})
    assert bound.excess(value) == pytest.approx(excess)


@pytest.mark.parametrize("text", ["5", "< 5", "<= five", "<= nan", "<= inf", "== 5", "", 5, None])
def test_what_is_no_bound_is_refused(text: Any) -> None:
    with pytest.raises(ConfigError, match="constraints: latency_ms: expected '<= NUMBER' or '>= NUMBER', got"):
        read_bounds({"latency_ms": text})


def test_other_than_a_mapping_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"constraints: expected a mapping such as \{'latency_ms': '<= 5'\}"):
        read_bounds(["latency_ms <= 5"])  # type: ignore[arg-type]
