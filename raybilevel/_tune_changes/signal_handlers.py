"""Tune's signal handlers are removed at the end of its run."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def restored_signal_handlers() -> Iterator[None]:
    """Restore the signal handlers after the block, in which a Tune run begins and ends.

    `ray.tune.tune._setup_signal_catching` (Ray 2.50.1 to 2.60.0) sets handlers of SIGINT and SIGUSR1, and keeps them
    when a run ends by itself. The first Ctrl-C after that does nothing. Outside the main thread it sets none.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
