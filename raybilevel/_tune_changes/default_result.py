"""A trial whose actor died before it reported has no result, whatever the actor died of."""

from __future__ import annotations

from functools import wraps
from typing import Any

from ray.exceptions import RayError

from raybilevel._tune_changes.change import MethodChange


def none_of_a_dead_actor(get: Any) -> Any:
    """`_get_default_result_or_future` that takes any error of Ray, where upstream's knows `RayActorError`."""

    @wraps(get)
    def get_or_none(self: Any) -> Any:
        try:
            return get(self)
        except RayError:
            self._default_result_or_future = None
            return None

    return get_or_none


def settle(controller: Any) -> None:
    """Ask failed trials for their result while the change holds. Tune's `ResultGrid` asks again after the run."""
    for trial in controller.get_trials():
        if trial.status == trial.ERROR:
            _ = trial.last_result


# Upstream asks a new actor for what it would report, and waits for the answer where a trial's last result is wanted
# before there is one: by reporters, callbacks, and the result grid.
DEFAULT_RESULT = MethodChange(
    name="no result of an actor that died of any error",
    module="ray.tune.experiment.trial",
    owner="Trial",
    attribute="_get_default_result_or_future",
    parameters=("self",),
    versions=("2.50.1", "2.55.1", "2.60.0"),
    replacement=none_of_a_dead_actor,
    without="a trial that Ray kills for its memory before its first report ends the whole run",
)
