"""A timeout that holds wherever the work hangs."""

from __future__ import annotations

import faulthandler
from collections.abc import Iterator
from contextlib import contextmanager

STDERR_FD = 2
"""faulthandler writes to a file descriptor, and `sys.stderr` may be replaced by an object without one."""


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Print the stack and kill this process if the block takes longer; None for no limit.

    A hung block may wait for a lock, a kernel or the network, and only killing its process is sure to end it. The timer
    runs in C and does not need Python's lock. A process has only one, so limits cannot be nested. Ray sees a dead
    worker. Tune then counts the trial as failed or, with `max_failures`, restarts it from its last checkpoint.
    """
    if seconds is None:
        yield
        return
    faulthandler.dump_traceback_later(seconds, exit=True, file=STDERR_FD)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
