"""The order in which trials get processes, where those take as long to start as a training."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler

SECONDS_TO_START = 60.0
"""What a process may take to start, and to get at its data."""


class PatientFIFO(FIFOScheduler):  # type: ignore[misc]
    """First in, first out, as without a scheduler, but a trial whose process is starting is left to wait for it, and
    processes that are free can be kept for a while.

    A process that a training leaves goes to the trial that has waited longest, in Tune (2.60), which then ends the one
    that was starting for that trial. Where many processes start at once, and trainings are not much longer than that,
    none of them ever gets there, and some slots stay without one. Here the newest trial, which nothing starts for yet,
    has the process that is free; if there is no such trial, Tune may give it to one whose own is starting. A trial
    that has waited for a minute waits for room, not for a process, and comes first. Where there is no next trial yet,
    since the search is still thinking about it, Tune ends all free processes but one; with `keep` they live on (see
    `KeptProcesses`).

        tune.TuneConfig(scheduler=PatientFIFO(keep=60), search_alg=..., reuse_actors=True)

    keep:  seconds for which a free process is kept, and with it the resources that it holds, so only where upper-level
        steps ask for none: they would wait for those.
    clock: seconds, from anywhere.
    """

    def __init__(self, keep: float = 0.0, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self.keep = keep
        self._clock = clock
        self._since: dict[str, float] = {}

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        self._keep_processes(tune_controller)
        live = tune_controller.get_live_trials()
        pending = {trial.trial_id: trial for trial in live if trial.status == Trial.PENDING}
        self._since = {trial: since for trial, since in self._since.items() if trial in pending}
        if not pending:
            paused = any(trial.status == Trial.PAUSED for trial in live)
            # Tune's own looks at all trials that there ever were.
            return super().choose_trial_to_run(tune_controller) if paused else None
        now = self._clock()
        new = next((trial for trial in pending if trial not in self._since), None)
        if new is not None:
            self._since[new] = now
            return pending[new]
        longest = min(self._since, key=self._since.__getitem__)
        return pending[longest] if now - self._since[longest] > SECONDS_TO_START else None

    def _keep_processes(self, tune_controller: Any) -> None:
        if self.keep > 0:
            with suppress(ImportError):  # a part of Tune that is its own has gone
                from raybilevel._tune_changes.kept_processes import keep_processes

                # Schedulers are given a wrapper that warns of whatever is not meant for them.
                keep_processes(getattr(tune_controller, "_tune_controller", tune_controller), self.keep, self._clock)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_since": {}}  # from a clock of this process
