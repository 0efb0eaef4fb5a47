"""The list of the changes of Tune, and the block in which they are in force."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from raybilevel._tune_changes.actor_errors import ACTOR_ERRORS
from raybilevel._tune_changes.default_result import DEFAULT_RESULT
from raybilevel._tune_changes.run_end import RUN_END
from raybilevel._tune_changes.trial_queue import TRIAL_QUEUE

CHANGES = (TRIAL_QUEUE, ACTOR_ERRORS, DEFAULT_RESULT, RUN_END)
"""They change classes, so they hold for every run of this process. `idle_actors` changes a single run."""

_lock = threading.RLock()  # reentrant, since the end of a run may come from the garbage collector
_undo = ExitStack()
_blocks = 0


@contextmanager
def tune_changes() -> Iterator[None]:
    """Change Tune inside the block. Blocks may overlap, also in threads. The last one to end undoes the changes."""
    _enter()
    try:
        yield
    finally:
        _leave()


def _enter() -> None:
    global _blocks
    with _lock:
        if _blocks == 0:
            for change in CHANGES:
                _undo.enter_context(change.applied())
        _blocks += 1


def _leave() -> None:
    global _blocks
    with _lock:
        _blocks -= 1
        if _blocks == 0:
            _undo.close()
