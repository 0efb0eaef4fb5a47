"""Upper-level steps of a search on Ray: launched, waited for, heard, and counted where they fail."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import ray

from raybilevel._cluster.pace import Pace
from raybilevel._cluster.sent_state import SentState
from raybilevel._cluster.step_call import SharedBySteps, StepCall
from raybilevel._cluster.step_dispatch import NO_RESOURCES, StepDispatch
from raybilevel.errors import RaybilevelError
from raybilevel.methods._base import UpperResult
from raybilevel.search import BilevelOptimizer
from raybilevel.tune._checkpoints import Checkpoints

logger = logging.getLogger(__name__)

MAX_FAILED_STEPS = 3
"""So many in a row end a search."""
STARVATION_WARNING_S = 30.0
IDLE_WAIT_S = 0.9
"""With no live trial Tune sleeps a second after a None, so then a wait of almost that costs nothing."""
INTERRUPT_CHECK_S = 0.5


class StepFailures:
    """Counts steps that failed, and those that could read none of their checkpoints."""

    def __init__(self) -> None:
        self._failed = self._unreadable = 0
        self._at: Counter[int] = Counter()

    def succeeded(self, result: UpperResult) -> None:
        self._failed = 0
        # A step without targets has read no checkpoint, and says nothing of them.
        if result.hypergradients:
            none_read = len(result.unreadable) == len(result.hypergradients)
            self._unreadable = self._unreadable + 1 if none_read else 0

    def failed(self, targets: Collection[int]) -> list[int]:
        """Count a step that looked for the hypergradients of these trainings; those at which steps failed before."""
        self._failed += 1
        self._unreadable += bool(targets)
        self._at.update(targets)
        return [index for index in targets if self._at[index] > 1]

    @property
    def too_many(self) -> bool:
        return max(self._failed, self._unreadable) >= MAX_FAILED_STEPS


class StepRunner:
    """Runs the steps that an optimizer plans, in one Ray session.

    share:      makes what all steps need; called when the first one is launched.
    options:    of the Ray task that a step is.
    time_limit: seconds that a step may run; None for no limit.
    fatal:      why the search cannot go on. It is to be raised where a trial is asked for: at a trial's end Tune would
        take it for that trial's.
    """

    def __init__(
        self, share: Callable[[], SharedBySteps], options: Mapping[str, Any], time_limit: float | None
    ) -> None:
        self._share, self._options, self._time_limit = share, options, time_limit
        self.pace = Pace()
        self.dispatch = StepDispatch()
        self.sent = SentState(ray.put)
        self.fatal: RaybilevelError | None = None
        self._shared: ray.ObjectRef | None = None
        self._failures = StepFailures()
        self._quiet_since = time.monotonic()

    def __len__(self) -> int:
        return len(self.dispatch)

    def prepare(self) -> None:
        """Start a worker for the first step beside the first trainings, where it takes no resources from them."""
        if self._shared is None and self._options == NO_RESOURCES and ray.is_initialized():
            self.dispatch.prepare(self._stored())

    def launch(self, optimizer: BilevelOptimizer, checkpoints: Checkpoints) -> bool:
        """Start steps while there are free slots and something to do; none while the checkpoints cannot be found.

        Returns:
            Whether any is under way that was not before.
        """
        if checkpoints.moved:
            return False
        before = len(self)
        while (step := optimizer.plan()) is not None:
            for index in step.targets:
                if index not in checkpoints.paths:
                    logger.warning("training %d left no checkpoint; its hypergradient is left out", index)
                    optimizer.leave_out(index)
            paths = {index: checkpoints.paths[index] for index in step.targets if index in checkpoints.paths}
            self.pace.step_begun(step.number)
            try:
                # Whole states would be n^2 records for n steps; see `SentState`.
                newest, blocks = self.sent.parts(step.state)
                most = self._options.get("memory")  # of its node, which Ray counts and does not enforce
                sent = replace(step, state=newest, targets=tuple(paths), most_memory=most)
                call = StepCall(sent, paths, optimizer.memory, self._time_limit)
                self.dispatch.begin(self._options, call, self._stored(), blocks)
            except ray.exceptions.RayError as error:  # the object store is full, for instance
                self._end(optimizer, step.number, error)
        return len(self) > before

    def hear(self, optimizer: BilevelOptimizer) -> None:
        """Hear of finished steps, and wait for one that is worth it where there is no next training."""
        if not self:
            return
        if optimizer.queue:
            self.collect(optimizer)
            return
        idle = not optimizer.state.pending
        until = time.monotonic() + max(self.pace.patience(optimizer.slots), IDLE_WAIT_S if idle else 0.0)
        while True:  # not in one go, so that Ctrl-C is heard
            self.collect(optimizer, timeout=min(INTERRUPT_CHECK_S, max(0.0, until - time.monotonic())))
            if not self or optimizer.queue or time.monotonic() >= until:
                break
        if idle:
            self._warn_of_starvation()

    def collect(self, optimizer: BilevelOptimizer, timeout: float = 0.0) -> None:
        """Tell the optimizer of finished steps. timeout: seconds to wait for one."""
        if not ray.is_initialized():  # to ask for results would start another Ray, which has none
            return
        for number, found in self.dispatch.ended(timeout):
            self._end(optimizer, number, found)

    def cancel(self, timeout: float = 0.0) -> None:
        """timeout: seconds to wait for the ends of steps."""
        self.pace.steps_cancelled()
        self.dispatch.cancel(timeout)

    def heard_of_a_trial(self) -> None:
        self._quiet_since = time.monotonic()

    def _stored(self) -> ray.ObjectRef:
        """What all steps need, in the object store."""
        if self._shared is None:
            self._shared = ray.put(self._share())
        return self._shared

    def _end(self, optimizer: BilevelOptimizer, number: int, found: UpperResult | Exception) -> None:
        self.pace.step_ended(number)
        step = optimizer.running.get(number)
        if isinstance(found, UpperResult):
            optimizer.tell_step(number, found)
            self._failures.succeeded(found)
            for index, why in found.unreadable.items():
                logger.error("the hypergradient of training %d is left out: %s", index, why)
            reason = "; ".join(found.unreadable.values())
        else:
            optimizer.tell_step(number, None)
            reason = self._reason(found)
            logger.error("upper-level step %d failed; a space-filling point takes its place: %s", number, reason)
            for index in self._failures.failed(step.targets if step is not None else ()):
                optimizer.leave_out(index)
        if self._failures.too_many:
            self.fatal = RaybilevelError(
                f"{MAX_FAILED_STEPS} upper-level steps in a row failed or found no checkpoint that could be read; "
                f"the search would be a random one. The last error: {reason}"
            )

    def _reason(self, failure: Exception) -> str:
        limit = self._time_limit
        if limit is None or not isinstance(failure, ray.exceptions.RayError):
            return str(failure)
        return f"{failure}; a step that runs for more than {limit:g} s is treated as hung, and its worker killed"

    def _warn_of_starvation(self) -> None:
        if self and time.monotonic() - self._quiet_since > STARVATION_WARNING_S:
            self._quiet_since = time.monotonic()
            logger.warning(
                "nothing but %d upper-level steps (%s) has been under way for %.0f s; if they wait for resources that "
                "an idle trial's worker holds, leave out reuse_actors=True, or leave them a share, e.g. trainings "
                "{'gpu': 0.8} and upper_resources={'gpu': 0.2} where there is one GPU", len(self), self._options,
                STARVATION_WARNING_S,
            )  # fmt: skip
