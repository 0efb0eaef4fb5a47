from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raybilevel._descents.augmented_lagrangian import Equality, MultiplierState, OneSided

constraints = st.floats(-1e3, 1e3)
states = st.builds(
    MultiplierState, multiplier=st.floats(0, 1e4), penalty=st.floats(1e-4, 1e4), violation=st.floats(0, 1e3)
)
methods = st.sampled_from([OneSided(), OneSided(growth=1.5, sufficient_decrease=0.9), Equality()])


@given(state=states, path=st.lists(constraints, max_size=10))
def test_a_one_sided_multiplier_is_never_negative(state: MultiplierState, path: list[float]):
    for constraint in path:
        before, state = state, OneSided().update(state, constraint)
        assert state.multiplier >= 0
        assert state.penalty >= before.penalty
        assert state.violation == max(0.0, constraint)


@given(method=methods, state=states, constraint=constraints, upper=constraints)
def test_the_force_is_the_derivative_of_the_merit(
    method: OneSided | Equality, state: MultiplierState, constraint: float, upper: float
):
    h = 1e-3 * (1 + abs(constraint))
    ends = [method.merit(state, upper, constraint + s * h) for s in (-1, 1)]
    # The merit is piecewise quadratic: a central difference is exact but within h of the kink, where it errs by at
    # most penalty h / 4; and rounding of the parts of the merit over h.
    parts = abs(upper) + (state.multiplier + state.penalty * (abs(constraint) + h)) ** 2 / state.penalty
    kink = state.penalty * h / 4 if abs(state.multiplier + state.penalty * constraint) < state.penalty * h else 0.0
    expected = (ends[1] - ends[0]) / (2 * h)
    assert method.force(state, constraint) == pytest.approx(expected, rel=1e-9, abs=1.01 * kink + 1e-15 * parts / h)


@given(state=states, upper=constraints, pair=st.tuples(constraints, constraints))
def test_the_one_sided_merit_never_falls_as_the_constraint_rises(
    state: MultiplierState, upper: float, pair: tuple[float, float]
):
    low, high = sorted(pair)
    assert OneSided().merit(state, upper, low) <= OneSided().merit(state, upper, high)


@given(state=states, constraint=constraints)
def test_on_the_constraint_the_merit_is_the_objective(state: MultiplierState, constraint: float):
    assert OneSided().merit(state, 3.0, 0.0) == 3.0
    assert Equality().merit(state, 3.0, 0.0) == 3.0
