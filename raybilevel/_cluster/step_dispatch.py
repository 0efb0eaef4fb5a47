"""Upper-level steps on Ray: in workers that stay for the next step, or as tasks if steps request resources."""

from __future__ import annotations

import math
import pickle
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raybilevel._cluster.pace import MEDIAN_WINDOW, WORKER_START_S
from raybilevel._cluster.resources import nodes_alive
from raybilevel._cluster.step_call import StepCall
from raybilevel._cluster.step_worker import MAX_RETRIES, StepWorker, upper_level_step
from raybilevel.errors import StepError
from raybilevel.methods._base import UpperResult

NO_RESOURCES: Mapping[str, Any] = {"num_cpus": 0}
"""Options of a step that requests no resources."""
MAX_IDLE_WORKERS = 16
WORKER_IDLE_TIMEOUT_S = 300.0
"""An idle worker holds the memory of its torch, so it ends after this time."""
DELIVERY_GRACE_S = 30.0
NODE_REFRESH_S = 5.0
INITIAL_STEP_ESTIMATE_S = 0.5


class StepDispatch:
    """The upper-level steps under way.

    A step that requests no resources runs in a worker, an actor that is kept for the next step. A task would have to
    start a process and import torch each time, since Ray ends idle processes on nodes whose CPUs are in use. A task
    also costs the driver half as much again. If all workers are busy, a step waits for one, or a new worker is started
    if that is faster. A worker that is idle for `WORKER_IDLE_TIMEOUT_S` ends. A step that requests resources is a task,
    which holds them only while it runs.

    clock: returns seconds, from any origin.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._running: dict[ray.ObjectRef, RunningStep] = {}  # by the references of their results
        self._waiting: deque[SentStep] = deque()
        self._idle: list[IdleWorker] = []
        self._undelivered: list[tuple[int, UpperResult | Exception]] = []
        self._seconds: deque[float] = deque(maxlen=MEDIAN_WINDOW)
        self._started = 0
        self._nodes: list[str] = []
        self._next_look = -math.inf

    def __len__(self) -> int:
        return len(self._running) + len(self._waiting) + len(self._undelivered)

    @property
    def results(self) -> list[ray.ObjectRef]:
        return list(self._running)

    def prepare(self, shared: ray.ObjectRef) -> None:
        """Start a worker for the first step that requests no resources."""
        worker = self._start()
        worker.prepare.remote([shared])
        self._idle.append(IdleWorker(worker, self._clock()))

    def begin(
        self, options: Mapping[str, Any], call: StepCall, shared: ray.ObjectRef, blocks: Sequence[ray.ObjectRef]
    ) -> None:
        """options: of a Ray task. shared: a `SharedBySteps`."""
        step = SentStep(call.step.number, pickle.dumps(call, pickle.HIGHEST_PROTOCOL), [shared, *blocks])
        if options == NO_RESOURCES:
            self._waiting.append(step)
            self._assign()
        else:
            result = upper_level_step.options(**options).remote(step.call, step.stored)
            self._running[result] = RunningStep(step, None, self._clock())

    def ended(self, timeout: float = 0.0) -> list[tuple[int, UpperResult | Exception]]:
        """Steps that have ended, by their number, with their results or errors.

        timeout: seconds to wait for one.
        """
        self._assign()
        ended, self._undelivered = self._undelivered, []
        if not self._running:
            return ended
        timeout = 0.0 if ended else timeout  # there is something to return already
        ready, _ = ray.wait(self.results, num_returns=1 if timeout else len(self._running), timeout=timeout)
        for result in ready:
            step = self._running.pop(result)
            if (found := self._end(step, result)) is not None:
                ended.append((step.sent.number, found))
        self._assign()
        return ended

    def _end(self, step: RunningStep, result: ray.ObjectRef) -> UpperResult | Exception | None:
        """The result or error of a step; None if its worker was lost and the step is retried in another."""
        found: UpperResult | Exception
        try:
            outcome: tuple[UpperResult | StepError, float] = pickle.loads(ray.get(result))
            found, seconds = outcome
            self._seconds.append(seconds)
        # `run_call` catches what a step raises, so this was raised before the step began. Its worker is fine.
        except ray.exceptions.RayTaskError as error:
            found = StepError(str(error))
        except ray.exceptions.RayError as error:
            for worker in (step.worker, *(idle.worker for idle in self._idle)):
                # Whatever killed the step's worker, e.g. the loss of its node, may have killed the idle ones too.
                kill(worker)
            self._idle.clear()
            self._next_look = -math.inf
            if step.worker is None or step.sent.attempt > MAX_RETRIES:  # Ray itself retries a task
                failure: Exception = error
                return failure
            self._waiting.appendleft(replace(step.sent, attempt=step.sent.attempt + 1))
            return None
        if step.worker is not None and len(self._idle) < MAX_IDLE_WORKERS:
            self._idle.append(IdleWorker(step.worker, self._clock()))
        else:
            kill(step.worker)
        return found

    def _assign(self) -> None:
        """Hand waiting steps to idle workers, and to new ones where that is faster."""
        self._idle = [idle for idle in self._idle if self._clock() - idle.since < WORKER_IDLE_TIMEOUT_S]
        while self._waiting and (self._idle or self._new_worker_is_faster()):
            step = self._waiting.popleft()
            worker = self._idle.pop().worker if self._idle else None
            try:
                started = worker or self._start()
                result = started.run.remote(step.call, step.stored)
            except ray.exceptions.RayError as error:  # the object store is full, for instance
                self._undelivered.append((step.number, error))
                continue
            # A new worker has to start, and then to fetch and unpickle the problem.
            delay = 2 * WORKER_START_S if worker is None else 0.0
            self._running[result] = RunningStep(step, started, self._clock() + delay)

    def _start(self) -> ActorHandle:
        """A new worker. The nodes that have CPUs take turns.

        A head node without CPUs is for drivers, and steps must not use its memory.
        """
        if self._clock() >= self._next_look:
            self._next_look = self._clock() + NODE_REFRESH_S
            self._nodes = [node["NodeID"] for node in nodes_alive() if node["Resources"].get("CPU")]
        options: dict[str, Any] = {}
        if self._nodes:
            # Ray (2.60) ignores the soft affinity of actors. If the node is lost, the step is retried elsewhere.
            node = self._nodes[self._started % len(self._nodes)]
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node, soft=False)
        self._started += 1
        # Longer than the dispatch keeps it, as the dispatch may have sent it a step at the last moment.
        return StepWorker.options(**options).remote(WORKER_IDLE_TIMEOUT_S + DELIVERY_GRACE_S)  # type: ignore[attr-defined]

    def _new_worker_is_faster(self) -> bool:
        """Whether the last waiting step would wait longer than a new worker takes to start.

        The estimate of a step's time is the median of past steps. Before any has ended it is the age of the oldest one.
        """
        now = self._clock()
        ages = [max(0.0, now - step.begun) for step in self._running.values() if step.worker is not None]
        step = statistics.median(self._seconds) if self._seconds else max(INITIAL_STEP_ESTIMATE_S, *ages, 0.0)
        ahead = sum(age < step + WORKER_START_S for age in ages)  # overdue steps are not waited for
        return not ahead or (ahead + len(self._waiting)) * step / ahead > WORKER_START_S

    def cancel(self, timeout: float = 0.0) -> None:
        """Kill all workers, and with them the steps under way.

        An exception raised wherever a step happens to be, e.g. in the middle of an import, would leave a broken worker
        for the next step.

        timeout: seconds to wait for the steps to end.
        """
        running, idle = self._running, self._idle
        self._running, self._idle, self._undelivered = {}, [], []
        self._waiting.clear()
        for result, step in running.items():
            if step.worker is None:
                ray.cancel(result, force=True)
        for worker in (*(step.worker for step in running.values()), *(one.worker for one in idle)):
            kill(worker)
        if running and timeout:
            for result in ray.wait(list(running), num_returns=len(running), timeout=timeout)[0]:
                with suppress(ray.exceptions.RayError):
                    ray.get(result)


@dataclass(frozen=True)
class SentStep:
    """A pickled `StepCall` with its arguments in the object store (see `run_call`). `attempt` counts from 1."""

    number: int
    call: bytes
    stored: list[ray.ObjectRef]
    attempt: int = 1


@dataclass(frozen=True)
class RunningStep:
    """A step in one of our workers, or a task if `worker` is None. `begun` is when its worker is, or will be, ready."""

    sent: SentStep
    worker: ActorHandle | None
    begun: float


@dataclass(frozen=True)
class IdleWorker:
    """A worker that has been idle since this time."""

    worker: ActorHandle
    since: float


def kill(worker: ActorHandle | None) -> None:
    if worker is not None and ray.is_initialized():
        ray.kill(worker)
