"""What a search knows, on its way to upper-level steps: most of it is put into Ray's object store once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

from raybilevel.search_state import SearchState

BLOCK = 32
"""Records in the smallest block; at least so many of the newest, which may still change, go along with each step."""


Reference = TypeVar("Reference")


class SentState(Generic[Reference]):
    """Hands states to tasks: the newest records by value, older ones in blocks that stay in the object store.

    A state of n trainings goes out with every step; sent whole, n steps would send n^2 of them. The sizes of the blocks
    are powers of two, so there are no more than log2(n) of them, and a record is put as often as blocks are merged,
    log2(n) times. A block in which something changed after all, e.g. a training that took long, is put anew.

    put: stores a block for as long as its reference lives, e.g. `ray.put`.
    """

    def __init__(self, put: Callable[[SearchState], Reference]) -> None:
        self._put = put
        self._blocks: dict[tuple[str, int, int], tuple[SearchState, Reference]] = {}

    def parts(self, state: SearchState) -> tuple[SearchState, list[Reference]]:
        """The newest records, and references to the blocks of all before them."""
        old_trainings = list(cuts(len(state.trainings) - len(state.pending)))
        old_steps = list(cuts(len(state.steps)))
        blocks = {("trainings", *cut): SearchState(trainings=state.trainings[slice(*cut)]) for cut in old_trainings}
        blocks |= {("steps", *cut): SearchState(steps=state.steps[slice(*cut)]) for cut in old_steps}
        before, self._blocks = self._blocks, {}
        for name, block in blocks.items():
            there = before.get(name)
            self._blocks[name] = there if there is not None and there[0] == block else (block, self._put(block))
        newest = SearchState(
            state.trainings[old_trainings[-1][1] if old_trainings else 0 :],
            state.steps[old_steps[-1][1] if old_steps else 0 :],
        )
        return newest, [reference for _, reference in self._blocks.values()]


def cuts(count: int) -> Iterator[tuple[int, int]]:
    """Where the blocks of so many records begin and end, the largest first; the newest records are in none."""
    units, start = max(0, count // BLOCK - 1), 0
    for bit in reversed(range(units.bit_length())):
        if units >> bit & 1:
            yield start, (start := start + (BLOCK << bit))


def joined(newest: SearchState, blocks: Sequence[SearchState]) -> SearchState:
    """The state again, from what `SentState.parts` made of it."""
    parts = (*blocks, newest)
    return SearchState(
        tuple(training for part in parts for training in part.trainings),
        tuple(step for part in parts for step in part.steps),
    )
