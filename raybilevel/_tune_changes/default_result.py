"""A trial whose actor died before its first report has no result, whatever the cause of death."""

from __future__ import annotations

from functools import wraps
from typing import Any

from ray.exceptions import RayError

from raybilevel._tune_changes.change import MethodChange


def none_on_ray_error(get: Any) -> Any:
    """`_get_default_result_or_future` that returns None on any error of Ray. Upstream's knows `RayActorError`."""

    @wraps(get)
    def get_or_none(self: Any) -> Any:
        try:
            return get(self)
        except RayError:
            self._default_result_or_future = None  # else the next question would raise the same error
            return None

    return get_or_none


def settle(controller: Any) -> None:
    """Ask failed trials for their result while the change is in force.

    Tune's `ResultGrid` asks again after the run, when it is no longer.
    """
    for trial in controller.get_trials():
        if trial.status == trial.ERROR:
            _ = trial.last_result  # a property that resolves the result and keeps it


# Upstream asks each new actor for its automatic fields (node, pid, ...). Reporters, callbacks and the result grid may
# want a trial's last result before its first report. Upstream then waits for that answer.
DEFAULT_RESULT = MethodChange(
    name="no result of an actor that died of any error",
    module="ray.tune.experiment.trial",
    owner="Trial",
    attribute="_get_default_result_or_future",
    parameters=("self",),
    versions=("2.50.1", "2.55.1", "2.60.0"),
    replacement=none_on_ray_error,
    without="a trial that Ray kills for its memory before its first report ends the whole run",
)
