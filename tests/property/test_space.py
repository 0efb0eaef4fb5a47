from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from raybilevel.space import Parameter, Space, flatten, nest

units = st.floats(0, 1)


@st.composite
def parameters(draw: st.DrawFn, log: bool | None = None, stepped: bool | None = None) -> Parameter:
    """Any interval whose length is neither lost in rounding nor beyond the largest float."""
    log = draw(st.booleans()) if log is None else log
    low = draw(st.floats(1e-8, 1e6) if log else st.floats(-1e6, 1e6))
    high = low * draw(st.floats(1.01, 1e8)) if log else low + draw(st.floats(1e-3, 1e6))
    stepped = draw(st.booleans()) if stepped is None else stepped
    step = (high - low) / draw(st.floats(1, 1000)) if stepped else None
    assume(step is None or max(abs(low), abs(high)) / step < 1e9)  # else the step is lost in rounding
    return Parameter(("group", "name"), low, high, log, step)


def condition(parameter: Parameter) -> float:
    """How much of a relative rounding error in the value reaches the unit coordinate."""
    if parameter.log:
        return (1 + abs(math.log(parameter.low))) / parameter.width
    return 1 + max(abs(parameter.low), abs(parameter.high)) / parameter.width


@given(parameter=parameters(stepped=False), unit=units)
def test_encode_undoes_decode(parameter: Parameter, unit: float):
    value = parameter.decode(torch.tensor(unit, dtype=torch.double)).item()
    # a few roundings of 1e-16 each, times the condition number
    assert parameter.encode(value) == pytest.approx(unit, abs=1e-15 * 8 * condition(parameter))


@given(parameter=parameters(stepped=False), fraction=units)
def test_decode_undoes_encode(parameter: Parameter, fraction: float):
    value = parameter.low + fraction * (parameter.high - parameter.low)
    again = parameter.decode(torch.tensor(parameter.encode(value), dtype=torch.double)).item()
    # exp loses one digit more per digit of its argument; the argument is below 40
    assert again == pytest.approx(value, rel=1e-13, abs=1e-15 * (abs(parameter.low) + abs(parameter.high)))


@given(parameter=parameters(), unit=units)
def test_a_suggestion_is_in_the_bounds_and_stays(parameter: Parameter, unit: float):
    space = Space((parameter,))
    value = space.to_config(torch.tensor([unit], dtype=torch.double))["group"]["name"]
    assert parameter.low <= value <= parameter.high
    again = space.to_config(space.encode({"group": {"name": value}}))["group"]["name"]
    assert again == pytest.approx(value, rel=1e-12, abs=1e-14 * (abs(parameter.low) + abs(parameter.high)))


@given(parameter=parameters(stepped=True), unit=units)
def test_a_stepped_suggestion_is_the_nearest_multiple(parameter: Parameter, unit: float):
    assert parameter.step is not None
    raw = parameter.decode(torch.tensor(unit, dtype=torch.double)).item()
    value = parameter.round(raw)
    first, last = math.ceil(parameter.low / parameter.step), math.floor(parameter.high / parameter.step)
    assume(first <= last)
    # quotients of up to 1e9 carry 1e-7 of rounding
    assert value / parameter.step == pytest.approx(round(value / parameter.step), abs=1e-6)
    inside = first * parameter.step <= raw <= last * parameter.step
    assert not inside or abs(value - raw) <= parameter.step * (0.5 + 1e-6)


@given(parameter=parameters(), unit=st.floats(0.01, 0.99))
def test_the_slope_is_the_derivative_of_decode(parameter: Parameter, unit: float):
    h = 1e-4 / max(1.0, parameter.width if parameter.log else 1.0)
    ends = parameter.decode(torch.tensor([unit - h, unit + h], dtype=torch.double)).tolist()
    middle = parameter.decode(torch.tensor(unit, dtype=torch.double)).item()
    # a central difference errs by (h width)^2 / 6 < 1e-8, and by the rounding of the values over h
    rounding = 1e-15 * max(map(abs, ends)) / h
    assert parameter.slope(middle) == pytest.approx((ends[1] - ends[0]) / (2 * h), rel=1e-7, abs=rounding)


keys = st.text("abc", min_size=1, max_size=2)
trees = st.recursive(
    st.dictionaries(keys, st.integers(), min_size=1, max_size=3),
    lambda inner: st.dictionaries(keys, st.integers() | inner, min_size=1, max_size=3),
    max_leaves=10,
)


@given(tree=trees)
def test_nest_undoes_flatten(tree: dict[str, object]):
    assert nest(flatten(tree)) == tree
