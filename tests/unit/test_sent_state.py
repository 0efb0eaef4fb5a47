from __future__ import annotations

import pickle

import pytest

from raybilevel._cluster.sent_state import BLOCK_SIZES, SentState, block_end, joined
from raybilevel.search_state import Proposal, SearchState, StepRecord


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
            state = state.change(ended, status="done", finished=ended, upper_loss=0.0, lower_loss=0.0)
            yield state
            state = state.change(ended, hypergradient=(0.5,)).after(StepRecord(ended, ended, 1.0))


@pytest.mark.parametrize("slots", [1, 3, 100])
def test_a_task_receives_the_whole_state(slots: int, store: Store):
    sent = SentState(store.put)
    for state in search(slots, 700):  # both blocks are there in the end
        assert repr(received(sent, state)) == repr(state)
    assert len(sent.parts(state)[1]) == 2


@pytest.mark.parametrize("slots", [1, 100])
def test_blocks_are_put_rarely(slots: int, store: Store):
    sent = SentState(store.put)
    large, small = BLOCK_SIZES
    for state in search(slots, 2000):
        newest, blocks = sent.parts(state)
        assert len(blocks) <= 2
        assert len(newest.trainings) < slots + 2 * small and len(newest.steps) < 2 * small
    # Large blocks at 512, 1,024 and 1,536; small ones, of half a large one on average, 2,000 / 32 times; of two kinds
    # of records, whichever moves on.
    assert store.records < 2 * 2 * (512 + 1024 + 1536 + 2000 / small * large / 2)


def test_a_late_change_is_sent(store: Store):
    *_, state = search(1, 300)
    sent = SentState(store.put)
    before = received(sent, state)
    assert before.trainings[7].upper_loss == 0.0
    put = store.records
    changed = state.change(7, upper_loss=-3.0)
    assert received(sent, changed).trainings[7].upper_loss == -3.0
    assert store.records == put + 2 * 256


def test_a_training_that_never_ends_does_not_hold_up_the_blocks(store: Store):
    *_, state = search(1, 300)
    state = state.change(0, status="pending", finished=-1)
    newest, blocks = SentState(store.put).parts(state)
    assert len(blocks) > 0 and len(newest.trainings) < 2 * BLOCK_SIZES[-1] + 2
    assert received(SentState(store.put), state).trainings[0].status == "pending"


@pytest.mark.parametrize("count", [0, 1, 32, 63, 64, 160, 227, 543, 544, 575, 576, 3200])
def test_the_newest_records_are_in_no_block(count: int):
    large, small = (block_end(count, size) for size in BLOCK_SIZES)
    assert large <= small and large % BLOCK_SIZES[0] == small % BLOCK_SIZES[1] == 0
    assert (
        count - small == count if count < 2 * BLOCK_SIZES[1] else BLOCK_SIZES[1] <= count - small < 2 * BLOCK_SIZES[1]
    )
    assert count - large < BLOCK_SIZES[0] + BLOCK_SIZES[1]
