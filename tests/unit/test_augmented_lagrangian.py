from __future__ import annotations

import pytest

from raybilevel._descents.augmented_lagrangian import Equality, MultiplierState


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
