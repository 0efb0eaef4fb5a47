from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from raybilevel.search._state_file import ADAPTER, SavedSearch, decode, encode
from raybilevel.search_state import Proposal, SearchState, StepRecord, Training
from raybilevel.space import Parameter

numbers = st.floats()  # NaN, infinities and subnormal numbers among them
units = st.lists(numbers, min_size=1, max_size=3).map(tuple)
maybe = st.none() | numbers
counts = st.integers(0, 100)
proposals = st.builds(
    Proposal, units, st.text(), st.none() | counts,
    maybe, maybe, maybe, maybe,
)  # fmt: skip
statuses = st.sampled_from(["pending", "done", "stopped", "failed", "lost"])
trainings = st.builds(
    Training, counts, proposals, statuses, counts, numbers, numbers, units, numbers, st.none() | units
)
steps = st.builds(StepRecord, counts, counts, numbers, maybe, maybe, maybe, maybe, maybe, maybe, counts)
searches = st.builds(
    SavedSearch,
    method=st.text(),
    settings=st.text(),
    seed=st.integers(),
    slots=counts,
    metric=st.text(),
    mode=st.sampled_from(["min", "max"]),
    parameters=st.just((Parameter(("a", "b"), 0.1, 1.0, True, 0.1),)),
    constants=st.text(),
    state=st.builds(SearchState, st.lists(trainings, max_size=3).map(tuple), st.lists(steps, max_size=2).map(tuple)),
    trials=st.dictionaries(st.text(), counts, max_size=3),
    queue=st.lists(proposals, max_size=2).map(tuple),
    checkpoints=st.dictionaries(counts, st.text(), max_size=2),
    memory=st.none() | st.binary().map(encode),
)


@given(search=searches)
def test_every_number_survives(search: SavedSearch):
    # the text of a float is exact, and NaN is not equal to itself
    assert repr(ADAPTER.validate_json(ADAPTER.dump_json(search))) == repr(search)


@given(memory=st.none() | st.binary())
def test_memory_survives(memory: bytes | None):
    assert decode(encode(memory)) == memory
