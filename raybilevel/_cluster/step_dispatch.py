"""Upper-level steps on Ray: in processes that stay for the next step, or as tasks where steps ask for resources."""

from __future__ import annotations

import math
import pickle
import statistics
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.fs
import ray
from ray import cloudpickle
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raybilevel._cluster.pace import NEWEST, PROCESS_START
from raybilevel._cluster.resources import nodes_alive
from raybilevel._cluster.sent_state import joined
from raybilevel._cluster.shared import Shared
from raybilevel._cluster.time_limit import time_limit
from raybilevel._lower.training import CHECKPOINT_FILE, load_checkpoint
from raybilevel.errors import CheckpointError, StepError
from raybilevel.methods._base import Method, UpperResult, UpperStep
from raybilevel.problem import BilevelProblem
from raybilevel.search_state import SearchState
from raybilevel.space import Space

NOTHING: Mapping[str, Any] = {"num_cpus": 0}
"""Options of a step that asks for no resources."""
TRIES_MORE = 3
MOST_IDLE = 16
SECONDS_IDLE = 300.0
"""A process of steps that has had none for so long ends: it holds the memory that torch takes."""
SECONDS_OF_THE_WAY = 30.0
SECONDS_BETWEEN_LOOKS = 5.0
FIRST_GUESS = 0.5
"""Seconds that a step may take, before any has ended."""


@dataclass(frozen=True)
class SharedBySteps:
    """What all steps of a search need, in the object store."""

    problem: Shared[BilevelProblem]
    space: Space
    constants: dict[str, Any]
    method: Method
    filesystem: pyarrow.fs.FileSystem | None


@dataclass(frozen=True)
class StepCall:
    """A step on its way to another process.

    paths:  the checkpoints of the step's targets.
    memory: what the method keeps between steps.
    limit:  seconds that the step may take.
    """

    step: UpperStep
    paths: Mapping[int, str]
    memory: bytes | None
    limit: float | None

    def run(self, shared: SharedBySteps, blocks: Sequence[SearchState]) -> UpperResult:
        """blocks: of the state, before what the step itself holds; see `SentState`."""
        step = replace(self.step, state=joined(self.step.state, blocks))
        with time_limit(self.limit):
            return shared.method.run(
                shared.problem.value,
                shared.space,
                shared.constants,
                step,
                lambda index: read_checkpoint(self.paths[index], shared.filesystem),
                self.memory,
            )


class StepDispatch:
    """The upper-level steps under way.

    A step that asks for nothing runs in a process that is kept for the next one, an actor: a task would pay for a
    process's start and its imports again where Ray ends idle ones, as it does on nodes whose CPUs are in use, and costs
    the driver half as much again. Where all are busy it waits for one, or another one is started if that is sooner.
    One that has had no step for minutes ends. A step that asks for resources is a task, which holds them only while it
    runs.

    clock: seconds, from anywhere.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._running: dict[ray.ObjectRef, Running] = {}  # by what will be their results
        self._waiting: deque[SentStep] = deque()
        self._idle: list[Idle] = []
        self._not_begun: list[tuple[int, UpperResult | Exception]] = []
        self._seconds: deque[float] = deque(maxlen=NEWEST)
        self._started = 0
        self._nodes: list[str] = []
        self._next_look = -math.inf

    def __len__(self) -> int:
        return len(self._running) + len(self._waiting) + len(self._not_begun)

    @property
    def results(self) -> list[ray.ObjectRef]:
        return list(self._running)

    def prepare(self, shared: ray.ObjectRef) -> None:
        """Start a process for the first step that asks for nothing."""
        process = self._start()
        process.prepare.remote([shared])
        self._idle.append(Idle(process, self._clock()))

    def begin(
        self, options: Mapping[str, Any], call: StepCall, shared: ray.ObjectRef, blocks: Sequence[ray.ObjectRef]
    ) -> None:
        """options: of a Ray task. shared: a `SharedBySteps`."""
        step = SentStep(call.step.number, pickle.dumps(call, pickle.HIGHEST_PROTOCOL), [shared, *blocks])
        if options == NOTHING:
            self._waiting.append(step)
            self._assign()
        else:
            result = upper_level_step.options(**options).remote(step.call, step.stored)
            self._running[result] = Running(step, None, self._clock())

    def ended(self, timeout: float = 0.0) -> list[tuple[int, UpperResult | Exception]]:
        """Steps that have ended, by their number, with what they found or how they failed.

        timeout: seconds to wait for one.
        """
        self._assign()
        ended, self._not_begun = self._not_begun, []
        if not self._running:
            return ended
        timeout = 0.0 if ended else timeout
        ready, _ = ray.wait(self.results, num_returns=1 if timeout else len(self._running), timeout=timeout)
        for result in ready:
            step = self._running.pop(result)
            if (found := self._end(step, result)) is not None:
                ended.append((step.sent.number, found))
        self._assign()
        return ended

    def _end(self, step: Running, result: ray.ObjectRef) -> UpperResult | Exception | None:
        """What the step found or how it failed; None where its process was lost and it is to run in another."""
        found: UpperResult | Exception
        try:
            outcome: tuple[UpperResult | StepError, float] = pickle.loads(ray.get(result))
            found, seconds = outcome
            self._seconds.append(seconds)
        except ray.exceptions.RayTaskError as error:  # raised before the step began, which does its process no harm
            found = StepError(str(error))
        except ray.exceptions.RayError as error:
            for process in (step.process, *(idle.process for idle in self._idle)):
                # what ended the step's, its node's loss perhaps, may have ended those
                end(process)
            self._idle.clear()
            self._next_look = -math.inf
            if step.process is None or step.sent.tries > TRIES_MORE:
                failure: Exception = error
                return failure
            self._waiting.appendleft(replace(step.sent, tries=step.sent.tries + 1))
            return None
        if step.process is not None and len(self._idle) < MOST_IDLE:
            self._idle.append(Idle(step.process, self._clock()))
        else:
            end(step.process)
        return found

    def _assign(self) -> None:
        """Steps that wait -> processes that are idle, and new ones where those would take longer."""
        self._idle = [idle for idle in self._idle if self._clock() - idle.since < SECONDS_IDLE]
        while self._waiting and (self._idle or self._is_sooner_in_another()):
            step = self._waiting.popleft()
            process = self._idle.pop().process if self._idle else None
            try:
                started = process or self._start()
                result = started.run.remote(step.call, step.stored)
            except ray.exceptions.RayError as error:  # the object store is full, for instance
                self._not_begun.append((step.number, error))
                continue
            delay = 2 * PROCESS_START if process is None else 0.0
            self._running[result] = Running(step, started, self._clock() + delay)

    def _start(self) -> ActorHandle:
        """A process, on one of the nodes that have CPUs after the other: a head that has none in Ray's books is to run
        drivers alone, and its memory is not for steps."""
        if self._clock() >= self._next_look:
            self._next_look = self._clock() + SECONDS_BETWEEN_LOOKS
            self._nodes = [node["NodeID"] for node in nodes_alive() if node["Resources"].get("CPU")]
        options: dict[str, Any] = {}
        if self._nodes:
            # Softly, Ray (2.60) would start it anywhere; if this node goes, the process is lost as with any other.
            node = self._nodes[self._started % len(self._nodes)]
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node, soft=False)
        self._started += 1
        # It ends some time after it is no longer given a step, which may be on its way.
        return StepProcess.options(**options).remote(SECONDS_IDLE + SECONDS_OF_THE_WAY)  # type: ignore[attr-defined]

    def _is_sooner_in_another(self) -> bool:
        """Whether the last of the waiting steps would end later than a new process takes to start.

        A step takes as long as others did; before any has ended, as long as the oldest has taken.
        """
        now = self._clock()
        ages = [max(0.0, now - step.begun) for step in self._running.values() if step.process is not None]
        step = statistics.median(self._seconds) if self._seconds else max(FIRST_GUESS, *ages, 0.0)
        ahead = sum(age < step + PROCESS_START for age in ages)  # nobody waits for those that are overdue
        return not ahead or (ahead + len(self._waiting)) * step / ahead > PROCESS_START

    def cancel(self, timeout: float = 0.0) -> None:
        """End the steps under way with their processes, and those that are idle: an exception raised wherever a step
        happens to be, in the middle of an import for instance, would leave a broken process for the next task.

        timeout: seconds to wait for the ends of steps.
        """
        running, idle = self._running, self._idle
        self._running, self._idle, self._not_begun = {}, [], []
        self._waiting.clear()
        for result, step in running.items():
            if step.process is None:
                ray.cancel(result, force=True)
        for process in (*(step.process for step in running.values()), *(one.process for one in idle)):
            end(process)
        if running and timeout:
            for result in ray.wait(list(running), num_returns=len(running), timeout=timeout)[0]:
                with suppress(ray.exceptions.RayError):
                    ray.get(result)


@dataclass(frozen=True)
class SentStep:
    """A pickled `StepCall` and what is stored for it; see `run_call`. `tries` counts its processes."""

    number: int
    call: bytes
    stored: list[ray.ObjectRef]
    tries: int = 1


@dataclass(frozen=True)
class Running:
    """A step in a process of ours, or as a task; `begun` is when it was handed over, or will have a process at last."""

    sent: SentStep
    process: ActorHandle | None
    begun: float


@dataclass(frozen=True)
class Idle:
    """A process of ours that has had no step since then."""

    process: ActorHandle
    since: float


def end(process: ActorHandle | None) -> None:
    if process is not None and ray.is_initialized():
        ray.kill(process)


@ray.remote(num_cpus=0)
class StepProcess:
    """Runs one step after the other, and ends by itself when it has had none for so many seconds.

    If it dies, or its node does, `StepDispatch` gives its step to another one: Ray (2.60) restarts actors itself, but
    after some losses of a node it never sends the call to the new one.
    """

    def __init__(self, seconds_idle: float) -> None:
        self._stored: dict[ray.ObjectRef, Any] = {}
        self._used, self._in_use = time.monotonic(), threading.Lock()
        threading.Thread(target=self._end_when_idle, args=(seconds_idle,), daemon=True).start()

    def prepare(self, stored: list[ray.ObjectRef]) -> None:
        """Have what is stored at hand; to unpickle it imports what steps need."""
        self._stored = {one: self._stored[one] if one in self._stored else ray.get(one) for one in stored}

    def run(self, call: bytes, stored: list[ray.ObjectRef]) -> bytes:
        with self._in_use:
            try:
                self.prepare(stored)
                return run_call(call, list(self._stored.values()))
            finally:
                self._used = time.monotonic()

    def _end_when_idle(self, seconds: float) -> None:
        """Whatever became of the search: Tune does not tell it of the end of a run that a time budget or a stopper
        ended, or that was restored."""
        left = seconds
        while left > 0:
            time.sleep(left)
            with self._in_use:
                left = self._used + seconds - time.monotonic()
        ray.kill(ray.get_runtime_context().current_actor)


@ray.remote(max_retries=TRIES_MORE)  # type: ignore[untyped-decorator]
def upper_level_step(call: bytes, stored: list[ray.ObjectRef]) -> bytes:
    return run_call(call, ray.get(stored))


def run_call(pickled: bytes, stored: list[Any]) -> bytes:
    """A pickled `StepCall` -> its result or a `StepError`, and the seconds that it took, pickled. Bytes both ways, as
    Ray's pickler in the driver would look at every object in Python.

    stored: a `SharedBySteps`, and the blocks of the state. Their references come in a list, as that costs the driver
        less than arguments that Ray looks up itself.
    """
    shared, *blocks = stored
    call: StepCall = pickle.loads(pickled)
    begun = time.monotonic()
    found: UpperResult | StepError
    try:
        found = call.run(shared, blocks)
    except Exception as error:
        found = StepError(f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
    result: bytes = cloudpickle.dumps((found, time.monotonic() - begun))
    return result


def read_checkpoint(path: str, filesystem: pyarrow.fs.FileSystem | None = None) -> dict[str, Any]:
    """A lower-level checkpoint from the experiment's storage.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    try:
        source = filesystem or pyarrow.fs.LocalFileSystem()
        with source.open_input_file(f"{path}/{CHECKPOINT_FILE}") as file:
            return load_checkpoint(file.read())
    except (OSError, pa.ArrowException) as error:
        raise CheckpointError(
            f"cannot read the checkpoint {path} ({error}); every node must see the experiment's storage"
        ) from error
