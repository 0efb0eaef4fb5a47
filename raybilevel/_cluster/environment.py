"""Settings that Ray Tune reads from the environment."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext


@contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    """Set an environment variable inside the block, and restore it afterwards."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def waiting_trials(slots: int) -> AbstractContextManager[None]:
    """Let `slots` trials wait for a worker or a node at once, unless the user has set the number.

    Tune's default for a searcher without `max_concurrent_trials` is one, so trials start one after the other. That is
    too slow if a worker takes longer to start than a training, or if an autoscaler adds nodes for pending trials.
    """
    # Tune has no argument for this number; it reads the variable when a run begins.
    name = "TUNE_MAX_PENDING_TRIALS_PG"
    return nullcontext() if name in os.environ else environment(name, str(slots))
