"""The end of a Tune run, of which Tune tells callbacks but no searcher."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any
from weakref import WeakKeyDictionary

from raybilevel._tune_changes.change import MethodChange
from raybilevel._tune_changes.default_result import settle

at_end: WeakKeyDictionary[Any, Callable[[], Any]] = WeakKeyDictionary()
"""What to do at the end of a run, by its `TuneController`."""


def with_what_is_to_be_done(cleanup: Callable[..., None]) -> Callable[..., None]:
    """`cleanup` that does what `at_end` holds as well."""

    @wraps(cleanup)
    def cleanup_and_end(self: Any) -> None:
        try:
            cleanup(self)
            settle(self)
        finally:
            end = at_end.pop(self, None)
            if end is not None:
                end()

    return cleanup_and_end


# `tune.run`, and so `Tuner.fit`, calls it once, whether the run has finished, has been stopped, or has failed.
RUN_END = MethodChange(
    name="end of a run",
    module="ray.tune.execution.tune_controller",
    owner="TuneController",
    attribute="cleanup",
    parameters=("self",),
    versions=("2.50.1", "2.55.1", "2.60.0"),
    replacement=with_what_is_to_be_done,
    without="a searcher changes nothing of Tune",
)
