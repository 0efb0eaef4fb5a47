"""Tune's event loop continues while a search computes the next trial."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import wraps
from typing import Any

from raybilevel._tune_changes.change import MethodChange

POLL_INTERVAL_S = 1.0


def asked_once(update: Callable[..., bool]) -> Callable[..., bool]:
    """`_update_trial_queue` that calls `suggest` once. Upstream's calls it until there is a trial."""

    @wraps(update)
    def update_once(self: Any, blocking: bool = False, timeout: float = POLL_INTERVAL_S) -> bool:
        found = update(self, blocking=False)
        if blocking and not found and not self.is_finished():
            # As long as upstream pauses between two calls, but now the event loop runs in between.
            time.sleep(min(POLL_INTERVAL_S, timeout))
        return found

    return update_once


# With no live trial upstream calls `suggest` once a second, for ten minutes, and handles no event meanwhile. The actors
# of the last trials have been told to stop but keep their resources, and an upper-level step that needs these waits.
TRIAL_QUEUE = MethodChange(
    name="event loop that continues while the search has no trial",
    module="ray.tune.execution.tune_controller",
    owner="TuneController",
    attribute="_update_trial_queue",
    parameters=("self", "blocking", "timeout"),
    versions=("2.50.1", "2.55.1", "2.60.0"),
    replacement=asked_once,
    without="upper-level steps may wait up to ten minutes for resources of trials that have ended",
)
