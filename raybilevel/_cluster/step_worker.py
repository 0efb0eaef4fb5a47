"""The actor and the task that run upper-level steps on Ray."""

from __future__ import annotations

import threading
import time
from typing import Any

import ray

from raybilevel._cluster.step_call import run_call

MAX_RETRIES = 3
"""How often a step is retried whose worker was lost."""


@ray.remote(num_cpus=0)
class StepWorker:
    """Runs one step after the other. It ends by itself after `idle_timeout` seconds without a step.

    If the worker or its node is lost, `StepDispatch` retries the step in another worker. Ray (2.60) can restart actors
    itself, but after some losses of a node it never sends the call to the new actor.
    """

    def __init__(self, idle_timeout: float) -> None:
        self._stored: dict[ray.ObjectRef, Any] = {}
        self._used, self._in_use = time.monotonic(), threading.Lock()
        threading.Thread(target=self._end_when_idle, args=(idle_timeout,), daemon=True).start()

    def prepare(self, stored: list[ray.ObjectRef]) -> None:
        """Fetch the arguments. Unpickling them imports what steps need."""
        # Only the arguments of the newest step are kept, so that older blocks of the state can be freed.
        self._stored = {one: self._stored[one] if one in self._stored else ray.get(one) for one in stored}

    def run(self, call: bytes, stored: list[ray.ObjectRef]) -> bytes:
        with self._in_use:
            try:
                self.prepare(stored)
                return run_call(call, list(self._stored.values()))
            finally:
                self._used = time.monotonic()

    def _end_when_idle(self, seconds: float) -> None:
        """End this worker when it has been idle for so long.

        It must do so itself. Tune does not tell a search when a time budget or a stopper ends a run, or when the search
        was restored.
        """
        left = seconds
        while left > 0:
            time.sleep(left)
            with self._in_use:  # never while a step runs
                left = self._used + seconds - time.monotonic()
        ray.kill(ray.get_runtime_context().current_actor)


@ray.remote(max_retries=MAX_RETRIES)  # type: ignore[untyped-decorator]
def upper_level_step(call: bytes, stored: list[ray.ObjectRef]) -> bytes:
    return run_call(call, ray.get(stored))
