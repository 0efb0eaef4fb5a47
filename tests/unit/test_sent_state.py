from __future__ import annotations

import pickle

import pytest

from raybilevel.search_state import Proposal, SearchState, StepRecord
from raybilevel.sent_state import BLOCK, SentState, cuts, joined


class Store:
    """In place of an object store: pickles, and how many records were put in all."""

    def __init__(self) -> None:
        self.records = 0

    def put(self, block: SearchState) -> bytes:
        self.records += len(block.trainings) + len(block.steps)
        return pickle.dumps(block)


@pytest.fixture
def store() -> Store:
    return Store()


def received(sent: SentState[bytes], state: SearchState) -> SearchState:
    """What a task has of a state."""
    newest, blocks = sent.parts(state)
    return joined(pickle.loads(pickle.dumps(newest)), [pickle.loads(block) for block in blocks])


def search(slots: int, trainings: int):
    """The states of a search before each of its steps: trainings end, the oldest first, and get a hypergradient."""
    state = SearchState()
    for index in range(trainings):
        state = state.add(Proposal((index / trainings,), "region", 0))
        if index >= slots:
            ended = index - slots
            state = state.change(ended, status="done", finished=ended, upper=0.0, value=0.0)
            yield state
            state = state.change(ended, hypergradient=(0.5,)).after(StepRecord(ended, ended, 1.0))


@pytest.mark.parametrize("slots", [1, 3, 100])
def test_a_task_has_the_state_that_was_sent(slots: int, store: Store):
    sent = SentState(store.put)
    for state in search(slots, 500):
        assert repr(received(sent, state)) == repr(state)


@pytest.mark.parametrize("slots", [1, 100])
def test_a_record_is_put_a_few_times_only(slots: int, store: Store):
    sent = SentState(store.put)
    for state in search(slots, 2000):
        newest, blocks = sent.parts(state)
        assert len(blocks) <= 2 * 6  # 2,000 / 32 is below 2^6
        assert len(newest.trainings) < slots + 2 * BLOCK and len(newest.steps) < 2 * BLOCK
    assert store.records < 2 * 2000 * 6


def test_a_late_change_is_sent(store: Store):
    *_, state = search(1, 300)
    sent = SentState(store.put)
    before = received(sent, state)
    assert before.trainings[7].upper == 0.0
    put = store.records
    changed = state.change(7, upper=-3.0)
    assert received(sent, changed).trainings[7].upper == -3.0
    assert put < store.records <= put + 256


def test_a_training_that_never_ends_does_not_hold_up_the_blocks(store: Store):
    *_, state = search(1, 300)
    state = state.change(0, status="pending", finished=-1)
    newest, blocks = SentState(store.put).parts(state)
    assert len(blocks) > 0 and len(newest.trainings) < 2 * BLOCK + 2
    assert received(SentState(store.put), state).trainings[0].status == "pending"


@pytest.mark.parametrize("count", [0, 1, BLOCK, 2 * BLOCK - 1, 2 * BLOCK, 5 * BLOCK, 7 * BLOCK + 3, 100 * BLOCK])
def test_blocks_leave_the_newest_out_and_no_gaps(count: int):
    found = list(cuts(count))
    ends = [0, *(stop for _, stop in found)]
    assert [start for start, _ in found] == ends[:-1]
    sizes = [stop - start for start, stop in found]
    assert sizes == sorted(set(sizes), reverse=True)
    assert count - ends[-1] == count if count < 2 * BLOCK else BLOCK <= count - ends[-1] < 2 * BLOCK
