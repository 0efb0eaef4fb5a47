"""What a search holds for as long as one Ray session lasts."""

from __future__ import annotations

import time
from typing import Any

import ray

from raybilevel._tune_changes.run import TuneRun
from raybilevel.errors import RaybilevelError
from raybilevel.tune._failures import FailedTrainings
from raybilevel.tune._lost_trials import LostTrials
from raybilevel.tune._steps import StepRunner

CLUSTER_CHECK_PERIOD_S = 5.0


class Session:
    """Never pickled: a search that is unpickled, or begins another run, makes a new one.

    began:    in seconds since 1970.
    job:      Ray's name for what this process does on its cluster.
    run:      Tune's, once it has asked for a trial.
    reported: trial id -> its last report.
    """

    def __init__(self, steps: StepRunner) -> None:
        self.steps = steps
        self.lost = LostTrials()
        self.failures = FailedTrainings()
        self.warned_of_stops = self.warned_of_another_problem = False
        # Wall time, as it is compared with times of files.
        self.began = time.time()
        self.job: str | None = None
        self.run: TuneRun | None = None
        self.reported: dict[str, dict[str, Any]] = {}
        self._fatal: RaybilevelError | None = None
        self._next_check = 0.0

    @property
    def fatal(self) -> RaybilevelError | None:
        """Why the search cannot go on."""
        return self._fatal or self.steps.fatal

    @fatal.setter
    def fatal(self, error: RaybilevelError) -> None:
        self._fatal = error

    def heard_of(self, trial: str) -> None:
        """Tune says something of a trial."""
        self.lost.heard_of(trial)
        self.steps.heard_of_a_trial()

    @property
    def should_check_cluster(self) -> bool:
        """Whether nodes may have joined or left since the last time this was true."""
        if not ray.is_initialized() or time.monotonic() < self._next_check:
            return False
        self._next_check = time.monotonic() + CLUSTER_CHECK_PERIOD_S
        return True


def job_of_ray() -> str | None:
    """Ray's name for what this process does on the cluster that it has joined."""
    if not ray.is_initialized():
        return None
    job: str = ray.get_runtime_context().get_job_id()
    return job
