"""What Tune does while no trial is live and its search is still thinking about the next one."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache, wraps
from typing import Any

from raybilevel.trial_failures import replace

SECONDS = 1.0


@cache
def go_on_while_idle() -> None:
    """Have Tune, in this process and from now on, go on with its work between two questions to a search.

    With no live trial Tune (2.60) asks the search once a second, for ten minutes, and does nothing else: the processes
    of the last trials, which are to end, keep their resources, and an upper-level step that needs those waits. Where
    Tune has changed by so much that there is no such place any more, nothing is done.
    """
    try:
        from ray.tune.execution.tune_controller import TuneController
    except ImportError:
        return
    replace(TuneController, "_update_trial_queue", asked_once)


def asked_once(update: Callable[..., bool]) -> Callable[..., bool]:
    """Where Tune asks for a trial: it does so once, and waits a second where it would go on asking."""

    @wraps(update)
    def update_once(self: Any, blocking: bool = False, timeout: float = SECONDS) -> bool:
        found = update(self, blocking=False)
        if blocking and not found and not self.is_finished():
            time.sleep(min(SECONDS, timeout))
        return found

    return update_once
