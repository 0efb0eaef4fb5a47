"""Figures of the benchmark of the driver."""

from __future__ import annotations

import math

import pytest

from benchmarks.overhead import busy_share, met


def test_slots_are_counted_from_the_moment_when_as_many_trials_have_ended() -> None:
    assert math.isnan(busy_share([(0.0, 1.0), (5.0, 6.0)], 2))
    assert math.isnan(busy_share([(0.0, 1.0)], 2))
    # Two slots from 6, when two have ended, to 9, when the last one begins: one sleeps all the time, the other from 8.
    times = [(0.0, 6.0), (5.0, 6.0), (6.0, 9.0), (8.0, 11.0), (9.0, 10.0)]
    assert busy_share(times, 2) == pytest.approx((3 + 1) / (2 * 3))


def test_a_bar_is_kept_or_missed_and_no_figure_misses_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert met("idle in %", 10.0, 10)
    assert not met("idle in %", 10.1, 10)
    assert not met("idle in %", math.nan, 10)
    assert capsys.readouterr().out.splitlines() == [
        "  bar: idle in % 10, 10 at most: met",
        "  bar: idle in % 10.1, 10 at most: MISSED",
        "  bar: idle in % nan, 10 at most: MISSED",
    ]
