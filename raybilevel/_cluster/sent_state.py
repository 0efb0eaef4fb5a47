"""What a search knows, on its way to upper-level steps: most of it is put into Ray's object store once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from raybilevel.search_state import SearchState

BLOCKS = (512, 32)
"""A block in the object store ends at a multiple of so many records; the second one follows the first."""


Reference = TypeVar("Reference")


class SentState(Generic[Reference]):
    """Hands states to tasks: the newest records, at least 32 of each kind, by value; older ones in two blocks that stay
    in the object store.

    A state of n trainings goes out with every step; sent whole, n steps would send n^2 of them. Ray's work for a task
    grows with the number of objects that it is given, so there are two only: one is put anew every 512 records, the
    other every 32. A block in which something changed after all, e.g. a training that took long, is put anew as well.

    put: stores a block for as long as its reference lives, e.g. `ray.put`.
    """

    def __init__(self, put: Callable[[SearchState], Reference]) -> None:
        self._put = put
        self._blocks: dict[int, tuple[SearchState, Reference]] = {}

    def parts(self, state: SearchState) -> tuple[SearchState, list[Reference]]:
        """The newest records, and references to the blocks of all before them."""
        before, self._blocks = self._blocks, {}
        trainings = steps = 0
        for size in BLOCKS:
            old = trainings, steps
            trainings = block_end(len(state.trainings) - len(state.pending), size)
            steps = block_end(len(state.steps), size)
            block = SearchState(state.trainings[old[0] : trainings], state.steps[old[1] : steps])
            if block != SearchState():
                there = before.get(size)
                self._blocks[size] = there if there is not None and there[0] == block else (block, self._put(block))
        newest = SearchState(state.trainings[trainings:], state.steps[steps:])
        return newest, [reference for _, reference in self._blocks.values()]


def block_end(count: int, size: int) -> int:
    """Where the last block of a size ends, of so many records; the newest ones are in none."""
    return max(0, count - BLOCKS[-1]) // size * size


def joined(newest: SearchState, blocks: Sequence[SearchState]) -> SearchState:
    """The state again, from what `SentState.parts` made of it."""
    parts = (*blocks, newest)
    return SearchState(
        tuple(training for part in parts for training in part.trainings),
        tuple(step for part in parts for step in part.steps),
    )
