"""Tune is changed while a run uses one of our searchers: from the first `suggest` to the end of the run.

Tune gives its controller to schedulers and callbacks but not to searchers, and does not tell them that a run has ended.
So we look for the controller among the callers of `suggest`. If anything else calls the searcher, nothing is changed.
The run ends with the controller's `cleanup`. If that is never reached, as after a second Ctrl-C, the run ends when the
controller is garbage-collected.

The change cannot begin earlier. `set_search_properties` is called before there is a controller, and we would not notice
a failure in between. So the first `suggest` runs in upstream's code. `raybilevel run` knows when its run begins and
ends, and wraps it in `tune_changes`.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary, finalize, ref

import ray.tune

from raybilevel._tune_changes import resource_warning
from raybilevel._tune_changes.applied import tune_changes
from raybilevel._tune_changes.run_end import RUN_END, at_end


class TuneRun:
    """A run that has called `suggest`. Made by `tune_run`.

    metric, mode: what `tune.run` was given, which a searcher is not told if it was given its space; None if unknown.
    """

    def __init__(self, controller: Any, metric: str | None = None, mode: str | None = None) -> None:
        # Weak, as the end of a run that never reaches its `cleanup` is that of its controller.
        self._controller = ref(controller)
        self.metric, self.mode = metric, mode
        self._changed = changed = ExitStack()
        changed.enter_context(tune_changes())
        only_with_pending = resource_warning.OnlyWithPendingTrials(controller)
        resource_warning.logger.addFilter(only_with_pending)
        changed.callback(resource_warning.logger.removeFilter, only_with_pending)
        end = finalize(controller, changed.close)
        end.atexit = False  # the interpreter is going away, and its modules with it
        at_end[controller] = end

    @property
    def idle(self) -> bool:
        """Whether no trial is pending, running or paused. Tune then calls `suggest` once a second, else ten times."""
        controller = self._controller()
        return controller is None or all(trial.is_finished() for trial in controller.get_live_trials())

    @property
    def samples(self) -> int | None:
        """Trials of the whole run; None if unknown. After a restore `set_search_properties` is told of one."""
        found: int | None = getattr(self._search_algorithm, "total_samples", None)
        return found

    @property
    def asks_no_more(self) -> bool:
        """Whether Tune has asked for all of its trials."""
        algorithm = self._search_algorithm
        return algorithm is not None and bool(algorithm.is_finished())

    @property
    def _search_algorithm(self) -> Any:
        return getattr(self._controller(), "_search_alg", None)

    def at_end(self, work: Callable[[], Any]) -> None:
        """Have something done when the run ends: complete, stopped or failed."""
        self._changed.callback(work)

    def error_file(self, trial_id: str) -> str | None:
        """Where Tune has written, on this machine, what a trial raised."""
        controller = self._controller()
        trials = [] if controller is None else controller.get_trials()
        path: str | None = next((trial.error_file for trial in trials if trial.trial_id == trial_id), None)
        return path


_runs: WeakKeyDictionary[Any, TuneRun] = WeakKeyDictionary()


def tune_run() -> TuneRun | None:
    """The run that is calling this searcher, with Tune changed until its end; None if no Tune run is."""
    controller, frame = _calling_controller()
    if controller is None:
        return None
    if controller not in _runs:
        _runs[controller] = TuneRun(controller, *_objective(frame))
    return _runs[controller]


def _calling_controller() -> tuple[Any, FrameType]:
    kind, frame = _controller_class(), sys._getframe(1)
    while kind is not None and frame.f_back is not None:
        frame = frame.f_back
        owner = frame.f_locals.get("self")
        if isinstance(owner, kind):
            return owner, frame
    return None, frame


def _objective(frame: FrameType | None) -> tuple[str | None, str | None]:
    """The metric and the mode of the call of `tune.run` around a frame."""
    code = inspect.unwrap(ray.tune.run).__code__
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return (None, None) if frame is None else (frame.f_locals.get("metric"), frame.f_locals.get("mode"))


@cache
def _controller_class() -> type | None:
    """`TuneController`; None if its end would go unnoticed. Then Tune must not be changed."""
    found = RUN_END.upstream()
    if found is None:
        RUN_END.warn_of_missing()
        return None
    return found[0]
