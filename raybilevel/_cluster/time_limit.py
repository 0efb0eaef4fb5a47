"""An end for work that hangs, wherever it hangs."""

from __future__ import annotations

import faulthandler
from collections.abc import Iterator
from contextlib import contextmanager

STDERR = 2


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """End this process if the block takes longer, after printing where it hangs; None for no limit.

    Only a process can be ended whatever it waits for, a lock, a kernel or a network: the clock runs in C, without
    Python's lock. To Ray it is a worker that died, so Tune counts the trial as failed or, with `max_failures`, tries it
    again from its last checkpoint. A process has one such clock.
    """
    if seconds is None:
        yield
        return
    faulthandler.dump_traceback_later(seconds, exit=True, file=STDERR)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
