"""The best training of a search with one value for all hyperparameters of a kind, to which the result is compared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from raybilevel._lower.paired import Gain, Gains
from raybilevel.search_state import SearchState, Training
from raybilevel.space import Space

SMALLEST_GROUP = 2
EQUAL = 1e-9
"""Difference of coordinates of the unit cube up to which they are one value; less than any step."""


class SharedValue(NamedTuple):
    """training: that with the lowest F of those tried; tried: how many there are."""

    training: Training
    tried: int


def best_shared(state: SearchState, space: Space) -> SharedValue | None:
    """None where no hyperparameters are of a kind (`Space.groups`), or where none of these trainings ran to its end."""
    groups = space.groups(SMALLEST_GROUP)
    tried = [training for training in state.done if groups and is_shared(training, groups)]
    return SharedValue(min(tried, key=lambda training: training.rank), len(tried)) if tried else None


class Compared(NamedTuple):
    """What the result of a search is compared with; None where there is none."""

    start: Training | None
    shared: SharedValue | None

    @classmethod
    def of(cls, state: SearchState, space: Space) -> Compared:
        return cls(state.start, best_shared(state, space))

    def beside(self, result: Training) -> list[Training]:
        """The trainings themselves, without the result."""
        trainings = (self.start, None if self.shared is None else self.shared.training)
        return [training for training in trainings if training is not None and training.index != result.index]

    def gains(self, found: Mapping[int, Gain | None]) -> Gains:
        """found: by the index of the training."""
        return Gains(
            None if self.start is None else found.get(self.start.index),
            None if self.shared is None else found.get(self.shared.training.index),
        )


def is_shared(training: Training, groups: tuple[tuple[int, ...], ...]) -> bool:
    values = [[training.unit[coordinate] for coordinate in group] for group in groups]
    return all(max(group) - min(group) <= EQUAL for group in values)
