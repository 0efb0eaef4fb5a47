"""What Tune does while no trial is live and its search is still thinking about the next one."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import cache, wraps
from typing import Any

from ray.tune.experiment import Trial

from raybilevel._tune_changes.patching import replace

SECONDS = 1.0

_idle: ContextVar[bool | None] = ContextVar("idle", default=None)


def tune_is_idle() -> bool | None:
    """For a search that Tune asks: whether no trial is pending, running or paused. None where nobody can say."""
    return _idle.get()


@cache
def go_on_while_idle() -> None:
    """Have Tune, in this process and from now on, go on with its work between two questions to a search.

    With no live trial Tune (2.60) asks the search once a second, for ten minutes, and does nothing else: the processes
    of the last trials, which are to end, keep their resources, and an upper-level step that needs those waits. And
    what it says after a minute without a trial, that the cluster may have too few resources, is for trials that wait
    for some. Where Tune has changed by so much that there are no such places any more, nothing is done.
    """
    try:
        from ray.tune.execution.insufficient_resources_manager import _InsufficientResourcesManager
        from ray.tune.execution.tune_controller import TuneController
    except ImportError:
        return
    replace(TuneController, "_update_trial_queue", asked_once)
    replace(_InsufficientResourcesManager, "on_no_available_trials", said_of_trials_that_wait)


def asked_once(update: Callable[..., bool]) -> Callable[..., bool]:
    """Where Tune asks for a trial: it does so once, and waits a second where it would go on asking."""

    @wraps(update)
    def update_once(self: Any, blocking: bool = False, timeout: float = SECONDS) -> bool:
        asked = _idle.set(blocking)
        try:
            found = update(self, blocking=False)
        finally:
            _idle.reset(asked)
        if blocking and not found and not self.is_finished():
            time.sleep(min(SECONDS, timeout))
        return found

    return update_once


def said_of_trials_that_wait(warn: Callable[..., None]) -> Callable[..., None]:
    """Where Tune counts the time in which nothing runs, to warn of too few resources."""

    @wraps(warn)
    def warn_if_one_waits(self: Any, all_trials: Sequence[Trial]) -> None:
        if any(trial.status == Trial.PENDING for trial in all_trials):
            warn(self, all_trials)

    return warn_if_one_waits
