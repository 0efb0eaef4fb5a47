from __future__ import annotations

import math
from typing import Any

import pytest

from raybilevel._descents.augmented_lagrangian import Equality, MultiplierState, OneSided
from raybilevel.errors import ConfigError


def test_a_one_sided_step_by_hand():
    method, state = OneSided(), MultiplierState(multiplier=1.0, penalty=4.0, violation=2.0)
    # at c = 0.5: 1 + 4 * 0.5 = 3
    assert method.force(state, 0.5) == 3.0
    assert method.merit(state, 10.0, 0.5) == 10 + (9 - 1) / 8
    assert method.update(state, 0.5) == MultiplierState(3.0, 4.0, 0.5)  # 0.5 is at most half of 2: the penalty stays


def test_a_one_sided_step_where_the_violation_stalls():
    method, state = OneSided(), MultiplierState(1.0, 4.0, violation=0.9)
    assert method.update(state, 0.5) == MultiplierState(3.0, 16.0, 0.5)
    assert OneSided(growth=2.0, sufficient_decrease=0.9).update(state, 0.5) == MultiplierState(3.0, 4.0, 0.5)
    assert OneSided(growth=2.0).update(state, 0.5) == MultiplierState(3.0, 8.0, 0.5)


def test_a_one_sided_step_well_inside():
    method, state = OneSided(), MultiplierState(1.0, 4.0, violation=0.9)
    assert method.force(state, -1.0) == 0.0
    assert method.merit(state, 10.0, -1.0) == 10 - 1 / 8
    assert method.update(state, -1.0) == MultiplierState(0.0, 4.0, 0.0)


def test_the_first_update_never_counts_as_stalled():
    assert OneSided().update(MultiplierState(0.0, 4.0), 1e9) == MultiplierState(4e9, 4.0, 1e9)


@pytest.mark.parametrize(("constraint", "violation"), [(0.5, 0.5), (-0.25, 0.25)])
def test_an_equality_step_by_hand(constraint: float, violation: float):
    method, state = Equality(), MultiplierState(multiplier=2.0, penalty=2.0)
    multiplier = 2.0 + 2.0 * constraint
    assert method.force(state, constraint) == multiplier
    assert method.merit(state, 10.0, constraint) == 10 + constraint**2 + 2 * constraint
    assert method.update(state, constraint) == MultiplierState(multiplier, 3.0, violation)


def test_an_equalitys_penalty_grows_whatever_the_violation():
    state = MultiplierState(0.0, 1.0)
    for expected in (2.0, 4.0, 8.0):
        state = Equality(growth=2.0).update(state, 0.0)
        assert (state.penalty, state.multiplier, state.violation) == (expected, 0.0, 0.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"growth": 1.0}, "growth must exceed 1"),
        ({"growth": math.nan}, "growth must exceed 1"),
        ({"sufficient_decrease": 0.0}, "between 0 and 1"),
        ({"sufficient_decrease": 1.0}, "between 0 and 1"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        OneSided(**settings)
