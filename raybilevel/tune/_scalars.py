"""What the search knows, in every trial's results, so that Tune's own loggers write it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from ray.tune import Callback

from raybilevel.search._diagnostics import diagnose
from raybilevel.search_state import SearchState
from raybilevel.tune._searcher import BilevelSearch

PREFIX = "search"
SHARE_OF_TIME = 0.05
"""Of the driver, for working out these numbers; after thousands of trainings that takes long each time."""


class SearchScalars(Callback):  # type: ignore[misc]
    """Adds `search/...` to each result of each trial: best_upper_loss, cost, trainings, upper_steps, multiplier,
    violation, value_error, expected_upper_loss, hypergradient_norm, hypergradient_steps, hypergradient_direction,
    hypergradient_length; those that are known by then. Violation and value_error are of methods with a v_hat.

        search = BilevelSearch(problem)
        tune.RunConfig(callbacks=[SearchScalars(search)])

    TensorBoard, CSV and JSON files are written by Tune itself. Other loggers (MLflow, Weights & Biases) come after it
    in the list of callbacks.
    """

    def __init__(self, search: BilevelSearch, clock: Callable[[], float] = time.monotonic) -> None:
        self._search: BilevelSearch | None = search
        self._clock = clock
        self._next_look = -math.inf
        self._state: SearchState | None = None
        self._numbers: dict[str, float] = {}

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if self._search is None:
            return
        began = self._clock()
        if self._search.state is not self._state and began >= self._next_look:
            self._state = self._search.state
            self._numbers = scalars(self._state)
            ended = self._clock()
            self._next_look = ended + (ended - began) / SHARE_OF_TIME
        result[PREFIX] = dict(self._numbers)

    def __getstate__(self) -> dict[str, Any]:
        return {"_search": None, "_state": None, "_numbers": {}}  # the search is saved by Tune itself


def scalars(state: SearchState) -> dict[str, float]:
    """The newest numbers of a search, without those that are not known yet."""
    found = diagnose(state)
    best = state.best
    numbers = {
        "best_upper_loss": None if best is None else best.upper_loss,
        "cost": state.cost,
        "trainings": float(len(state.told)),
        "upper_steps": float(len(state.steps)),
        "multiplier": found.multiplier,
        "violation": found.violation,
        "value_error": found.value_error,
        "hypergradient_norm": found.hypergradient_norm,
        "expected_upper_loss": found.expected_upper_loss,
        "hypergradient_steps": float(found.hypergradient_steps),
        "hypergradient_direction": found.hypergradient_direction,
        "hypergradient_length": found.hypergradient_length,
    }
    return {name: value for name, value in numbers.items() if value is not None and math.isfinite(value)}
