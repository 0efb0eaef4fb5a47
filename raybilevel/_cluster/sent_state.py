"""The state of a search as it is sent to upper-level steps: most of it is put into Ray's object store once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from raybilevel.search_state import SearchState

BLOCK_SIZES = (512, 32)
"""The first block ends at a multiple of 512 records. The second follows it and ends at a multiple of 32."""


Reference = TypeVar("Reference")


class SentState(Generic[Reference]):
    """Sends states to tasks. The newest records, at least 32 of each kind, travel by value. The older ones stay in the
    object store, in two blocks.

    A state of n trainings is sent with every step, so n steps would send n^2 trainings if each were sent whole. Ray's
    work for a task grows with the number of its object references, so there are only two. One block is replaced every
    512 records, the other every 32. A block is also replaced if one of its records changes, as when a long training
    ends.

    put: stores a block for as long as its reference lives, e.g. `ray.put`.
    """

    def __init__(self, put: Callable[[SearchState], Reference]) -> None:
        self._put = put
        self._blocks: dict[int, tuple[SearchState, Reference]] = {}

    def parts(self, state: SearchState) -> tuple[SearchState, list[Reference]]:
        """The newest records, and references to the blocks of all earlier ones."""
        before, self._blocks = self._blocks, {}  # a reference that is dropped frees its block in the object store
        trainings = steps = 0
        for size in BLOCK_SIZES:
            old = trainings, steps
            # Records of pending trainings still change, so they are left out of the count.
            trainings = block_end(len(state.trainings) - len(state.pending), size)
            steps = block_end(len(state.steps), size)
            block = SearchState(state.trainings[old[0] : trainings], state.steps[old[1] : steps])
            if block != SearchState():
                there = before.get(size)
                self._blocks[size] = there if there is not None and there[0] == block else (block, self._put(block))
        newest = SearchState(state.trainings[trainings:], state.steps[steps:])
        return newest, [reference for _, reference in self._blocks.values()]


def block_end(count: int, size: int) -> int:
    """Where the last block of this size ends among `count` records. The newest records are in no block."""
    return max(0, count - BLOCK_SIZES[-1]) // size * size


def joined(newest: SearchState, blocks: Sequence[SearchState]) -> SearchState:
    """The whole state from the parts of `SentState.parts`."""
    parts = (*blocks, newest)
    return SearchState(
        tuple(training for part in parts for training in part.trainings),
        tuple(step for part in parts for step in part.steps),
    )
