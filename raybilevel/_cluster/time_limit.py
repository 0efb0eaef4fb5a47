"""A timeout that holds wherever the work hangs."""

from __future__ import annotations

import faulthandler
from collections.abc import Iterator
from contextlib import contextmanager

STDERR = 2


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Kill this process if the block takes longer, after printing its stack; None for no limit.

    A hung block may wait for a lock, a kernel or the network, and only killing its process is sure to end it. The clock
    runs in C, without Python's lock, and a process has one. Ray sees a dead worker. Tune then counts the trial as
    failed or, with `max_failures`, restarts it from its last checkpoint.
    """
    if seconds is None:
        yield
        return
    faulthandler.dump_traceback_later(seconds, exit=True, file=STDERR)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
