"""The end of a Tune run. Tune tells callbacks about it, but not searchers."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any
from weakref import WeakKeyDictionary

from raybilevel._tune_changes.change import MethodChange
from raybilevel._tune_changes.default_result import settle

at_end: WeakKeyDictionary[Any, Callable[[], Any]] = WeakKeyDictionary()
"""What to call at the end of a run, by its `TuneController`."""


def with_end_callback(cleanup: Callable[..., None]) -> Callable[..., None]:
    """`cleanup` that also calls what `at_end` has for the run."""

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


# `tune.run`, and so `Tuner.fit`, calls it once, whether the run has finished, was stopped or has failed.
RUN_END = MethodChange(
    name="end of a run",
    module="ray.tune.execution.tune_controller",
    owner="TuneController",
    attribute="cleanup",
    parameters=("self",),
    versions=("2.50.1", "2.55.1", "2.60.0"),
    replacement=with_end_callback,
    without="a searcher changes nothing of Tune",
)
