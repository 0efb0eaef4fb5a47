"""Upper-level steps on Ray: in processes that stay for the next step, or as tasks where steps ask for resources."""

from __future__ import annotations

import pickle
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import pyarrow.fs
import ray
from ray import cloudpickle
from ray.actor import ActorHandle

from raybilevel.errors import CheckpointError
from raybilevel.lower_level import CHECKPOINT_FILE, load_checkpoint
from raybilevel.methods.base import Method, UpperResult, UpperStep
from raybilevel.pace import NEWEST, PROCESS_START
from raybilevel.problem import BilevelProblem
from raybilevel.search_state import SearchState
from raybilevel.sent_state import joined
from raybilevel.shared import Shared
from raybilevel.space import Space
from raybilevel.time_limit import time_limit

NOTHING: Mapping[str, Any] = {"num_cpus": 0}
"""Options of a step that asks for no resources."""
TRIES_MORE = 3
MOST_IDLE = 16
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
    the driver half as much again. Where all are busy it waits for one, or another one is started if that is sooner. A
    step that asks for resources is a task, which holds them only while it runs.

    clock: seconds, from anywhere.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._running: dict[ray.ObjectRef, Running] = {}  # by what will be their results
        self._waiting: deque[SentStep] = deque()
        self._idle: list[ActorHandle] = []
        self._seconds: deque[float] = deque(maxlen=NEWEST)

    def __len__(self) -> int:
        return len(self._running) + len(self._waiting)

    @property
    def results(self) -> list[ray.ObjectRef]:
        return list(self._running)

    def prepare(self, shared: ray.ObjectRef) -> None:
        """Start a process for the first step that asks for nothing."""
        process = StepProcess.remote()  # type: ignore[attr-defined]
        process.prepare.remote([shared])
        self._idle.append(process)

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

    def ended(self, timeout: float = 0.0) -> list[tuple[int, UpperResult | ray.exceptions.RayError]]:
        """Steps that have ended, by their number, with what they found or how they failed.

        timeout: seconds to wait for one.
        """
        self._assign()
        if not self._running:
            return []
        ready, _ = ray.wait(self.results, num_returns=1 if timeout else len(self._running), timeout=timeout)
        over = [(self._running.pop(result), result) for result in ready]
        ended = [(step.sent.number, found) for step, result in over if (found := self._end(step, result)) is not None]
        self._assign()
        return ended

    def _end(self, step: Running, result: ray.ObjectRef) -> UpperResult | ray.exceptions.RayError | None:
        """What the step found or how it failed; None where its process was lost and it is to run in another."""
        found: UpperResult | ray.exceptions.RayError
        try:
            found, seconds = pickle.loads(ray.get(result))
            self._seconds.append(seconds)
        except ray.exceptions.RayTaskError as error:  # what a step raises does its process no harm
            found = error
        except ray.exceptions.RayError as error:
            for process in (step.process, *self._idle):  # what ended it, its node's loss perhaps, may have ended those
                end(process)
            self._idle.clear()
            if step.process is None or step.sent.tries > TRIES_MORE:
                return error
            self._waiting.appendleft(replace(step.sent, tries=step.sent.tries + 1))
            return None
        if step.process is not None and len(self._idle) < MOST_IDLE:
            self._idle.append(step.process)
        else:
            end(step.process)
        return found

    def _assign(self) -> None:
        """Steps that wait -> processes that are idle, and new ones where those would take longer."""
        while self._waiting and (self._idle or self._is_sooner_in_another()):
            process = self._idle.pop() if self._idle else StepProcess.remote()  # type: ignore[attr-defined]
            step = self._waiting.popleft()
            result = process.run.remote(step.call, step.stored)
            self._running[result] = Running(step, process, self._clock())

    def _is_sooner_in_another(self) -> bool:
        """Whether the last of the waiting steps would end later than a new process takes to start."""
        begun = [step.begun for step in self._running.values() if step.process is not None]
        if not begun:
            return True
        if self._seconds:
            step = statistics.median(self._seconds)
        else:  # a step that has not ended by the time when it must have a process is a long one
            step = max(FIRST_GUESS, self._clock() - min(begun) - 2 * PROCESS_START)
        return (len(begun) + len(self._waiting)) * step / len(begun) > PROCESS_START

    def cancel(self, timeout: float = 0.0) -> None:
        """End the steps under way with their processes, and those that are idle: an exception raised wherever a step
        happens to be, in the middle of an import for instance, would leave a broken process for the next task.

        timeout: seconds to wait for the ends of steps.
        """
        running, idle = self._running, self._idle
        self._running, self._idle = {}, []
        self._waiting.clear()
        for result, step in running.items():
            if step.process is None:
                ray.cancel(result, force=True)
        for process in (*(step.process for step in running.values()), *idle):
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
    """A step in a process of ours, or as a task; `begun` is when it was handed over."""

    sent: SentStep
    process: ActorHandle | None
    begun: float


def end(process: ActorHandle | None) -> None:
    if process is not None and ray.is_initialized():
        ray.kill(process)


@ray.remote(num_cpus=0)
class StepProcess:
    """Runs one step after the other.

    If it dies, or its node does, `StepDispatch` gives its step to another one: Ray (2.60) restarts actors itself, but
    after some losses of a node it never sends the call to the new one.
    """

    def __init__(self) -> None:
        self._stored: dict[ray.ObjectRef, Any] = {}

    def prepare(self, stored: list[ray.ObjectRef]) -> None:
        """Have what is stored at hand; to unpickle it imports what steps need."""
        self._stored = {one: self._stored[one] if one in self._stored else ray.get(one) for one in stored}

    def run(self, call: bytes, stored: list[ray.ObjectRef]) -> bytes:
        self.prepare(stored)
        return run_call(call, list(self._stored.values()))


@ray.remote(max_retries=TRIES_MORE)  # type: ignore[untyped-decorator]
def upper_level_step(call: bytes, stored: list[ray.ObjectRef]) -> bytes:
    return run_call(call, ray.get(stored))


def run_call(pickled: bytes, stored: list[Any]) -> bytes:
    """A pickled `StepCall` -> its result and the seconds that it took, pickled. Bytes both ways: Ray's pickler in the
    driver would look at every object in Python.

    stored: a `SharedBySteps`, and the blocks of the state. Their references come in a list, as that costs the driver
        less than arguments that Ray looks up itself.
    """
    shared, *blocks = stored
    call: StepCall = pickle.loads(pickled)
    begun = time.monotonic()
    found = call.run(shared, blocks)
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
    except OSError as error:
        raise CheckpointError(
            f"cannot read the checkpoint {path} ({error}); every node must see the experiment's storage"
        ) from error
