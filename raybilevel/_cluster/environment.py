"""Settings that Ray Tune reads from the environment."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext


@contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    """A variable inside the block; after it, as it was."""
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
    """Trials that may wait for a process or a node at once, unless the user has said how many.

    Tune's default for a searcher is one (without `max_concurrent_trials`): the others begin one after the other, which
    is too slow where a process takes longer to start than a training, or where nodes are added for trials that wait.
    """
    name = "TUNE_MAX_PENDING_TRIALS_PG"
    return nullcontext() if name in os.environ else environment(name, str(slots))
