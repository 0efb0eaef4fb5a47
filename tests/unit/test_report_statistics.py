from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raybilevel.report._statistics import bootstrap, holm, paired_test, rank


def test_a_bootstrap_interval_holds_the_mean_and_is_that_of_the_normal_theory_for_many_values() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, 400).tolist()
    interval = bootstrap(values)
    half = 1.96 * float(np.std(values)) / 20
    assert interval.low is not None and interval.high is not None
    assert interval.mean == pytest.approx(float(np.mean(values)))
    # 2,000 resamples put the quantiles within a few per cent of the half-width.
    assert interval.mean - interval.low == pytest.approx(half, rel=0.15)
    assert interval.high - interval.mean == pytest.approx(half, rel=0.15)
    assert bootstrap(values) == interval


def test_an_interval_of_one_value_and_of_equal_ones() -> None:
    assert (bootstrap([2.0]).low, bootstrap([2.0]).count) == (None, 1)
    same = bootstrap([2.0, 2.0, 2.0])
    assert (same.mean, same.low, same.high) == (2.0, 2.0, 2.0)


def test_ranks_share_ties_and_leave_out_blocks_that_lack_a_method() -> None:
    blocks = [{"a": 1.0, "b": 2.0, "c": 2.0}, {"a": 3.0, "b": 1.0, "c": 2.0}, {"a": 0.0, "b": 1.0}]
    result = rank(blocks)
    assert result.blocks == 2
    assert result.mean == pytest.approx({"a": 2.0, "b": 1.75, "c": 2.25})
    assert result.wins == {"a": 1, "b": 1, "c": 0}
    assert result.friedman is not None and 0 < result.friedman <= 1
    assert rank([{"a": 1.0, "b": 2.0}]).friedman is None
    assert rank([]).blocks == 0


def test_the_least_p_of_a_few_pairs_is_what_all_signs_alike_give() -> None:
    for count in (2, 4, 6):
        result = paired_test([1.0 + i for i in range(count)], [2.0 + 1.1 * i for i in range(count)])
        assert result.least == pytest.approx(2 / 2**count)
        assert result.p == pytest.approx(result.least)
        assert result.difference.mean < 0
    assert paired_test([1.0], [2.0]).p is None


def test_no_difference_is_not_significant() -> None:
    assert paired_test([1.0, 2.0, 3.0, 4.0], [2.0, 1.0, 4.0, 3.0]).p == pytest.approx(1.0)


def test_holm_on_an_example_worked_by_hand() -> None:
    # Sorted 0.01, 0.02, 0.03 times 3, 2, 1: 0.03, 0.04, 0.03, and never less than the one before.
    assert holm([0.03, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_never_lowers_a_p_keeps_their_order_and_is_below_bonferroni(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    assert all(a >= p for a, p in zip(adjusted, p_values, strict=True))
    assert all(a <= min(1.0, len(p_values) * p) + 1e-12 for a, p in zip(adjusted, p_values, strict=True))
    pairs = sorted(zip(p_values, adjusted, strict=True))
    assert [a for _, a in pairs] == sorted(a for _, a in pairs)
