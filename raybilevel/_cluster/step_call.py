"""One upper-level step on its way to another process, and what runs it there."""

from __future__ import annotations

import pickle
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.fs
from ray import cloudpickle

from raybilevel._cluster.sent_state import joined
from raybilevel._cluster.shared import Shared
from raybilevel._cluster.time_limit import time_limit
from raybilevel._lower.training import CHECKPOINT_FILE, load_checkpoint
from raybilevel.errors import CheckpointError, StepError
from raybilevel.methods._base import StepMethod, UpperResult, UpperStep
from raybilevel.problem import BilevelProblem
from raybilevel.search_state import SearchState
from raybilevel.space import Space


@dataclass(frozen=True)
class SharedBySteps:
    """What all steps of a search need; it is put into the object store once."""

    problem: Shared[BilevelProblem]
    space: Space
    constants: dict[str, Any]
    method: StepMethod
    filesystem: pyarrow.fs.FileSystem | None


@dataclass(frozen=True)
class StepCall:
    """A step to be run in another process.

    paths:  the checkpoints of the step's targets.
    memory: what the method keeps between steps.
    limit:  seconds that the step may take.
    """

    step: UpperStep
    paths: Mapping[int, str]
    memory: bytes | None
    limit: float | None

    def run(self, shared: SharedBySteps, blocks: Sequence[SearchState]) -> UpperResult:
        """blocks: the older parts of the state, which the step does not hold itself; see `SentState`."""
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


def run_call(pickled: bytes, stored: list[Any]) -> bytes:
    """Run a pickled `StepCall`; its result or a `StepError`, and the seconds that it took, pickled.

    Bytes travel both ways, as Ray's pickler in the driver would visit every object in Python.

    stored: a `SharedBySteps` and the blocks of the state. Their references come in a list, which costs the driver less
        than arguments that Ray resolves itself.
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
