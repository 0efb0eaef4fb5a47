"""Upper-level steps on Ray: in processes that stay for the next step, or as tasks where steps ask for resources."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping, Sequence
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


@dataclass(frozen=True)
class SharedBySteps:
    """What all steps of a search need, in the object store."""

    problem: Shared[BilevelProblem]
    space: Space
    constants: dict[str, Any]
    method: Method
    filesystem: pyarrow.fs.FileSystem | None


class StepDispatch:
    """The upper-level steps under way.

    A step that asks for nothing runs in a process that is kept for the next one, an actor: a task would pay for a
    process's start and its imports again where Ray ends idle ones, as it does on nodes whose CPUs are in use, and costs
    the driver half as much again. One that asks for resources is a task, which holds them only while it runs.
    """

    def __init__(self) -> None:
        self._running: dict[int, tuple[ray.ObjectRef, ActorHandle | None]] = {}
        self._idle: list[ActorHandle] = []

    def __len__(self) -> int:
        return len(self._running)

    @property
    def results(self) -> list[ray.ObjectRef]:
        return [result for result, _ in self._running.values()]

    def prepare(self, shared: ray.ObjectRef) -> None:
        """Start a process for the first step that asks for nothing."""
        process = StepProcess.remote()  # type: ignore[attr-defined]
        process.prepare.remote([shared])
        self._idle.append(process)

    def begin(
        self, options: Mapping[str, Any], call: StepCall, shared: ray.ObjectRef, blocks: Sequence[ray.ObjectRef]
    ) -> None:
        """options: of a Ray task. shared: a `SharedBySteps`."""
        sent, stored = pickle.dumps(call, pickle.HIGHEST_PROTOCOL), [shared, *blocks]
        process = None
        if options == NOTHING:
            process = self._idle.pop() if self._idle else StepProcess.remote()  # type: ignore[attr-defined]
            result = process.run.remote(sent, stored)
        else:
            result = upper_level_step.options(**options).remote(sent, stored)
        self._running[call.step.number] = result, process

    def ended(self, timeout: float = 0.0) -> Iterator[tuple[int, UpperResult | ray.exceptions.RayError]]:
        """Steps that have ended, by their number, with what they found or how they failed.

        timeout: seconds to wait for one.
        """
        if not self._running:
            return
        ready, _ = ray.wait(self.results, num_returns=1 if timeout else len(self._running), timeout=timeout)
        for number in [number for number, (result, _) in self._running.items() if result in ready]:
            result, process = self._running.pop(number)
            found: UpperResult | ray.exceptions.RayError
            try:
                found = pickle.loads(ray.get(result))
            except ray.exceptions.RayError as error:
                found = error
            # What a step raises leaves its process as good as it was.
            sound = isinstance(found, UpperResult | ray.exceptions.RayTaskError)
            if process is not None and sound and len(self._idle) < MOST_IDLE:
                self._idle.append(process)
            else:
                end(process)
            yield number, found

    def cancel(self, timeout: float = 0.0) -> None:
        """End the steps under way with their processes, and those that are idle: an exception raised wherever a step
        happens to be, in the middle of an import for instance, would leave a broken process for the next task.

        timeout: seconds to wait for the ends of steps.
        """
        running, self._running = list(self._running.values()), {}
        idle, self._idle = self._idle, []
        for result, process in running:
            if process is None:
                ray.cancel(result, force=True)
            end(process)
        for process in idle:
            end(process)
        results = [result for result, _ in running]
        if results and timeout:
            for result in ray.wait(results, num_returns=len(results), timeout=timeout)[0]:
                with suppress(ray.exceptions.RayError):
                    ray.get(result)


def end(process: ActorHandle | None) -> None:
    if process is not None:
        ray.kill(process)


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=TRIES_MORE)
class StepProcess:
    """Runs one step after the other. If it dies, or its node does, another one takes its place and its step."""

    def __init__(self) -> None:
        self._stored: dict[ray.ObjectRef, Any] = {}

    def prepare(self, stored: list[ray.ObjectRef]) -> None:
        """Have what is stored at hand; to unpickle it imports what steps need."""
        self._stored = {one: self._stored[one] if one in self._stored else ray.get(one) for one in stored}

    def run(self, sent: bytes, stored: list[ray.ObjectRef]) -> bytes:
        self.prepare(stored)
        return run_call(sent, list(self._stored.values()))


@ray.remote(max_retries=TRIES_MORE)  # type: ignore[untyped-decorator]
def upper_level_step(sent: bytes, stored: list[ray.ObjectRef]) -> bytes:
    return run_call(sent, ray.get(stored))


def run_call(sent: bytes, stored: list[Any]) -> bytes:
    """A pickled `StepCall` -> its pickled result. Bytes both ways: Ray's pickler in the driver would look at every
    object in Python.

    stored: a `SharedBySteps`, and the blocks of the state. Their references come in a list, as that costs the driver
        less than arguments that Ray looks up itself.
    """
    shared, *blocks = stored
    call: StepCall = pickle.loads(sent)
    result: bytes = cloudpickle.dumps(call.run(shared, blocks))
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
