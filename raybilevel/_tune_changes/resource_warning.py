"""A filter of Tune's warning that the cluster has too few resources."""

from __future__ import annotations

import logging
from typing import Any
from weakref import ref

logger = logging.getLogger("ray.tune.execution.insufficient_resources_manager")


class OnlyWithPendingTrials(logging.Filter):
    """Drops the warning while the run has no pending trial.

    Tune warns if no trial has been running for a minute. Without a pending trial the search is taking that time, and
    resources are not the cause.
    """

    def __init__(self, controller: Any) -> None:
        super().__init__()
        self._controller = ref(controller)  # weak: a logger's filters live as long as the process

    def filter(self, record: logging.LogRecord) -> bool:
        controller = self._controller()
        return controller is None or any(trial.status == trial.PENDING for trial in controller.get_live_trials())
