"""The order in which trials get processes, where those take as long to start as a training."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler

SECONDS_TO_START = 60.0


class PatientFIFO(FIFOScheduler):  # type: ignore[misc]
    """First in, first out, as without a scheduler, but a trial whose process is starting is left to wait for it.

    A process that a training leaves goes to the trial that has waited longest, in Tune (2.60), which then ends the one
    that was starting for that trial. Where many processes start at once, and trainings are not much longer than that,
    none of them ever gets there, and some slots stay without one. Here the newest trial, which nothing starts for yet,
    has the process that is free; a trial that has waited for a minute waits for room, not for a process, and comes
    first.

        tune.TuneConfig(scheduler=PatientFIFO(), search_alg=..., reuse_actors=True)

    clock: seconds, from anywhere.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._since: dict[str, float] = {}

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
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

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_since": {}}  # from a clock of this process
