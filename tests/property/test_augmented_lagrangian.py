from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raybilevel._descents.augmented_lagrangian import Equality, MultiplierState

constraints = st.floats(-1e3, 1e3)
states = st.builds(
    MultiplierState, multiplier=st.floats(0, 1e4), penalty=st.floats(1e-4, 1e4), violation=st.floats(0, 1e3)
)
methods = st.sampled_from([Equality(), Equality(growth=3.0)])


@given(method=methods, state=states, constraint=constraints, upper=constraints)
def test_the_force_is_the_derivative_of_the_merit(
    method: Equality, state: MultiplierState, constraint: float, upper: float
):
    h = 1e-3 * (1 + abs(constraint))
    ends = [method.merit(state, upper, constraint + s * h) for s in (-1, 1)]
    # The merit is quadratic, so that a central difference errs by rounding of the parts of the merit over h alone.
    parts = abs(upper) + (state.multiplier + state.penalty * (abs(constraint) + h)) ** 2 / state.penalty
    expected = (ends[1] - ends[0]) / (2 * h)
    assert method.force(state, constraint) == pytest.approx(expected, rel=1e-9, abs=1e-15 * parts / h)


@given(state=states, constraint=constraints)
def test_on_the_constraint_the_merit_is_the_objective(state: MultiplierState, constraint: float):
    assert Equality().merit(state, 3.0, 0.0) == 3.0
