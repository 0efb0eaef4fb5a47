"""What ends the process of one trial ends that trial, not Tune's whole run."""

from __future__ import annotations

from functools import cache, wraps
from typing import Any

from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.tune.experiment import Trial

from raybilevel._tune_changes.patching import replace


@cache
def keep_to_the_trial() -> None:
    """Have Tune, in this process and from now on, count every error of Ray as a failure of the trial that it came from.

    Tune (2.60) knows those of a dead process and of an exception in it. For others, such as `OutOfMemoryError`, by
    which Ray says that it has ended a process because the memory of its node was used up, it raises `RuntimeError:
    Caught unexpected exception`, and every other training ends with it. Where Tune has changed by so much that there
    are no such places any more, nothing is done.
    """
    try:
        from ray.air.execution._internal.actor_manager import RayActorManager
    except ImportError:
        return
    replace(RayActorManager, "_actor_task_failed", as_of_a_dead_process)
    replace(Trial, "_get_default_result_or_future", none_of_a_dead_process)


def as_of_a_dead_process(told_of: Any) -> Any:
    """Where Tune is told of an error of a trial's process: it hears of it as of the process's death."""

    @wraps(told_of)
    def tell(self: Any, tracked_actor_task: Any, exception: Exception) -> None:
        if isinstance(exception, RayError) and not isinstance(exception, RayActorError | RayTaskError):
            exception = RayActorError(error_msg=f"{type(exception).__name__}: {exception}")
        told_of(self, tracked_actor_task, exception)

    return tell


def none_of_a_dead_process(get: Any) -> Any:
    """Where Tune asks the process of a trial that has not reported what it would report: there is nothing, whatever the
    process died of."""

    @wraps(get)
    def get_or_none(self: Any) -> Any:
        try:
            return get(self)
        except RayError:
            self._default_result_or_future = None
            return None

    return get_or_none
