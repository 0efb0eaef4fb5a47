"""Trials that nobody runs any more, of which Tune does not tell a search."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from raybilevel.search import BilevelOptimizer

IDLE_POLL_PERIOD_S = 0.9
"""With no live trial Tune asks for one once a second, else ten times as often."""
IDLE_POLLS = 60
"""So often Tune may ask while it has nothing to run, before the trials under way are taken for lost."""


class LostTrials:
    """Finds the trials that would hold their slots for ever. A late result of theirs would still count.

    All that are under way, where Tune has had nothing to run for a minute. Of those under way at a restore, which Tune
    may have been told to leave out, those still silent when more trainings have ended than there were of them and two
    for each slot: there may be fewer slots than before, and some may still be in Tune's queue.

    clock: seconds, from anywhere.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._answered = clock()
        self._idle_polls = 0
        self._silent: set[str] = set()
        self._told_by_then = 0

    def asked(self, idle: bool | None) -> None:
        """Tune asks for a trial. idle: whether it has nothing to run; None where nobody can say."""
        if idle is None:
            idle = self._clock() - self._answered > IDLE_POLL_PERIOD_S
        self._idle_polls = self._idle_polls + 1 if idle else 0

    def answered(self, with_trial: bool) -> None:
        self._answered = self._clock()
        if with_trial:
            self._idle_polls = 0

    def heard_of(self, trial: str) -> None:
        self._silent.discard(trial)
        self._idle_polls = 0

    def restored(self, pending: Iterable[str], told: int) -> None:
        """Trials under way at a restore, of which something is to be heard; `told` trainings had ended."""
        self._silent = set(pending)
        self._told_by_then = told + len(self._silent)

    def find(self, optimizer: BilevelOptimizer) -> list[str]:
        if self._idle_polls > IDLE_POLLS:
            lost = optimizer.pending_trials
        elif self._silent and len(optimizer.state.told) - self._told_by_then > 2 * optimizer.slots:
            lost = [trial for trial in optimizer.pending_trials if trial in self._silent]
        else:
            return []
        self._silent.clear()
        return lost
