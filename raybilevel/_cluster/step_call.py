"""One upper-level step as it is sent to another process, and the function that runs it there."""

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
    """What all steps of a search need. It is put into the object store once."""

    problem: Shared[BilevelProblem]
    space: Space
    constants: dict[str, Any]
    method: StepMethod
    filesystem: pyarrow.fs.FileSystem | None


@dataclass(frozen=True)
class StepCall:
    """A step to run in another process.

    paths:  of the checkpoints of the step's targets, by the index of their training.
    memory: the method's own state between steps.
    limit:  timeout of the step in seconds; None for none.
    """

    step: UpperStep
    paths: Mapping[int, str]
    memory: bytes | None
    limit: float | None

    def run(self, shared: SharedBySteps, blocks: Sequence[SearchState]) -> UpperResult:
        """blocks: the older parts of the state, which the step itself does not contain; see `SentState`."""
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
    """Run a pickled `StepCall`. Returns its result or a `StepError`, with its seconds, pickled.

    Both directions use bytes, since Ray's own pickler would visit every object in Python in the driver.

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
        # As text, since an exception of a problem's own code need not survive pickling.
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
