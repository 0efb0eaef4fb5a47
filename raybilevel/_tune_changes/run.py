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

import sys
from contextlib import ExitStack
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary, finalize, ref

from raybilevel._tune_changes import resource_warning
from raybilevel._tune_changes.applied import tune_changes
from raybilevel._tune_changes.run_end import RUN_END, at_end


class TuneRun:
    """A run that has called `suggest`. Made by `tune_run`."""

    def __init__(self, controller: Any) -> None:
        self._controller = ref(controller)
        changed = ExitStack()
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

    def error_file(self, trial_id: str) -> str | None:
        """Where Tune has written, on this machine, what a trial raised."""
        controller = self._controller()
        trials = [] if controller is None else controller.get_trials()
        path: str | None = next((trial.error_file for trial in trials if trial.trial_id == trial_id), None)
        return path


_runs: WeakKeyDictionary[Any, TuneRun] = WeakKeyDictionary()


def tune_run() -> TuneRun | None:
    """The run that is calling this searcher, with Tune changed until its end; None if no Tune run is."""
    controller = _calling_controller()
    if controller is None:
        return None
    if controller not in _runs:
        _runs[controller] = TuneRun(controller)
    return _runs[controller]


def _calling_controller() -> Any:
    kind, frame = _controller_class(), sys._getframe(1)
    while kind is not None and frame.f_back is not None:
        frame = frame.f_back
        owner = frame.f_locals.get("self")
        if isinstance(owner, kind):
            return owner
    return None


@cache
def _controller_class() -> type | None:
    """`TuneController`; None if its end would go unnoticed. Then Tune must not be changed."""
    found = RUN_END.upstream()
    if found is None:
        RUN_END.warn_of_missing()
        return None
    return found[0]
