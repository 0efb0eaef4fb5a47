"""The order in which trials get workers, where those take as long to start as a training."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler

from raybilevel._tune_changes.idle_actors import keep_idle_actors

WORKER_START_S = 60.0
"""What a worker may take to start, and to get at its data."""


class PatientFIFO(FIFOScheduler):  # type: ignore[misc]
    """First in, first out, as without a scheduler, but a trial waits for the worker that is starting for it, and idle
    workers can be kept for a while.

    In Tune the worker that a training leaves goes to the trial that has waited longest, and the one that was starting
    for that trial is stopped. Where many workers start at once, and trainings take not much longer than that, none of
    them ever gets to a trial, and some slots stay without one. Here the newest trial, for which nothing starts yet, has
    the idle worker. Without such a trial Tune may give it to one whose own is starting. A trial that has waited for a
    minute waits for room, not for a worker, and comes first. While the search still thinks about the next trial, Tune
    stops all idle workers but one. With `idle_timeout_s` they live on (see `IdleActorCache`).

        tune.TuneConfig(scheduler=PatientFIFO(idle_timeout_s=60), search_alg=..., reuse_actors=True)

    idle_timeout_s: how long an idle worker is kept, and with it the resources that it holds. So only where upper-level
        steps ask for none: they would wait for those.
    clock: seconds, from anywhere.
    """

    def __init__(self, idle_timeout_s: float = 0.0, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self.idle_timeout_s = idle_timeout_s
        self._clock = clock
        self._since: dict[str, float] = {}

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        if self.idle_timeout_s > 0:
            # Schedulers are given a wrapper that warns of whatever is not meant for them.
            controller = getattr(tune_controller, "_tune_controller", tune_controller)
            keep_idle_actors(controller, self.idle_timeout_s, self._clock)
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
        return pending[longest] if now - self._since[longest] > WORKER_START_S else None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_since": {}}  # from a clock of this process
