"""An error of Ray ends only the trial that it came from, and not the whole run."""

from __future__ import annotations

from functools import wraps
from typing import Any

from ray.exceptions import RayActorError, RayError, RayTaskError

from raybilevel._tune_changes.change import MethodChange


def as_actor_death(failed: Any) -> Any:
    """`_actor_task_failed` for any error of Ray. Upstream's knows two."""

    @wraps(failed)
    def failed_by_any_error(self: Any, tracked_actor_task: Any, exception: Exception) -> None:
        if isinstance(exception, RayError) and not isinstance(exception, RayActorError | RayTaskError):
            exception = RayActorError(error_msg=f"{type(exception).__name__}: {exception}")
        failed(self, tracked_actor_task, exception)

    return failed_by_any_error


# Upstream knows two errors: the actor died, or its code raised an exception. For others it raises "RuntimeError: Caught
# unexpected exception". One is the `OutOfMemoryError` of an actor that Ray killed because its node ran out of memory.
ACTOR_ERRORS = MethodChange(
    name="errors of Ray that end one trial",
    module="ray.air.execution._internal.actor_manager",
    owner="RayActorManager",
    attribute="_actor_task_failed",
    parameters=("self", "tracked_actor_task", "exception"),
    versions=("2.50.1", "2.55.1", "2.60.0"),
    replacement=as_actor_death,
    without="a trial that Ray kills for its memory ends the whole run",
)
