"""How many trainings and upper-level steps a search has under way at once."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from raybilevel._cluster.resources import most_slots, trainings_that_fit


class Slots:
    """A number that the user or Tune gives, or what the cluster holds at the time.

    given:   by the user; None for as many trainings as fit into the cluster, within bounds; see `most_slots`.
    bundles: what each process of a training asks for, by Ray's names.
    limit:   the number that is given, if any.
    """

    def __init__(self, given: int | None, bundles: Sequence[Mapping[str, float]]) -> None:
        self._given = given
        self._bundles = bundles
        self._most = most_slots(0)
        self.limit = given

    def begin_run(self, samples: int | None) -> None:
        """samples: trials of the run, if their number is known; Tune says `sys.maxsize` for trials without end."""
        self._most = most_slots(0 if samples in (None, sys.maxsize) else samples)

    def restore(self, slots: int) -> None:
        """The run that is resumed had so many; its `num_samples` is not told again."""
        self._most = max(self._most, slots)

    def limit_to(self, count: int) -> int:
        """Tune's limit, within the user's; each run may have another one."""
        self.limit = min(count, self._given or count)
        return self.limit

    @property
    def now(self) -> int:
        return self.limit or max(1, min(self._most, trainings_that_fit(self._bundles)))
