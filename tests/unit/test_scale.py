"""Figures of the benchmark of the driver."""

from __future__ import annotations

import math

import pytest

from raybilevel.benchmark.scale import busy_share


def test_slots_are_counted_from_the_moment_when_all_have_had_a_trial() -> None:
    assert math.isnan(busy_share([(0.0, 1.0), (5.0, 6.0)], 2))
    # Two slots from 5 to 8: the first sleeps for one second and two more, the second for one.
    times = [(0.0, 6.0), (5.0, 6.0), (6.0, 9.0), (8.0, 9.0)]
    assert busy_share(times, 2) == pytest.approx((1 + 1 + 2) / (2 * 3))
