"""The searchers of a comparison: a wrapper that measures time, and raybilevel's own within a budget."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from ray.tune import uniform
from ray.tune.search import Searcher

from raybilevel._records.record import Overhead
from raybilevel.space import Space
from raybilevel.tune._searcher import BilevelSearch


@dataclass
class Stopwatch:
    """The wall-clock and CPU seconds of a method in the driver, over `calls` calls."""

    calls: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    @contextmanager
    def timed(self) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.thread_time()
        try:
            yield
        finally:
            self.calls += 1
            self.seconds += time.perf_counter() - wall
            self.cpu_seconds += time.thread_time() - cpu  # of this thread, as Ray has others in the driver


class TimedSearcher(Searcher):  # type: ignore[misc]
    """A searcher with a stopwatch. It passes all calls on to the inner searcher.

    box: the space of the hyperparameters, if the inner searcher is to search the unit cube instead.
    """

    def __init__(self, searcher: Searcher, box: Space | None = None) -> None:
        self.inner, self.box, self.overhead = searcher, box, Stopwatch()
        super().__init__(metric=searcher.metric, mode=searcher.mode)

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        self._metric: str | None = metric or self.metric
        self._mode: str | None = mode or self.mode
        if self.box is not None:
            config = {name: uniform(0.0, 1.0) for name in coordinates(self.box)}
        with self.overhead.timed():
            return bool(self.inner.set_search_properties(metric, mode, config, **spec))

    def set_max_concurrency(self, max_concurrent: int) -> bool:
        return bool(self.inner.set_max_concurrency(max_concurrent))

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        with self.overhead.timed():
            suggestion: dict[str, Any] | str | None = self.inner.suggest(trial_id)
        if self.box is None or not isinstance(suggestion, dict):
            return suggestion
        # Clamped, in case a searcher leaves its bounds by rounding.
        unit = [min(1.0, max(0.0, float(suggestion[name]))) for name in coordinates(self.box)]
        return self.box.to_config(torch.tensor(unit, dtype=torch.double))

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        with self.overhead.timed():
            self.inner.on_trial_result(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        with self.overhead.timed():
            self.inner.on_trial_complete(trial_id, result=result, error=error)

    def on_pause(self, trial_id: str) -> None:
        self.inner.on_pause(trial_id)

    def on_unpause(self, trial_id: str) -> None:
        self.inner.on_unpause(trial_id)

    def save(self, checkpoint_path: str) -> None:
        """Do nothing. An interrupted run is done again from the start, and some searchers cannot be saved."""

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a run of a comparison is done again from the start")

    def get_state(self) -> dict[str, Any]:
        return {}


def coordinates(box: Space) -> list[str]:
    """Names of the unit cube's coordinates. Those of hyperparameters have slashes, which some searchers refuse."""
    return [f"x{number}" for number in range(box.dimension)]


class BudgetedSearch(BilevelSearch):
    """`BilevelSearch` that starts no training if the budget has no room for it.

    room: whether the budget has room; called before each suggestion.
    """

    def __init__(self, *arguments: Any, room: Callable[[], bool] = lambda: True, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.room = room

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if not self.room():
            return str(Searcher.FINISHED)
        return super().suggest(trial_id)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "room": None}  # a method of the ledger, which belongs to one process


def spent_on_steps(searcher: BilevelSearch) -> tuple[float, int]:
    """Gradient evaluations of finished upper-level steps, and the number of steps under way."""
    return sum(step.passes for step in searcher.state.steps), searcher.steps_under_way


def overhead_of(searcher: TimedSearcher | None) -> Overhead:
    """The overhead of a searcher in the form of a record; zero for Tune's own variant generator."""
    found = searcher.overhead if searcher is not None else Stopwatch()
    return Overhead(
        calls=found.calls, suggest_seconds=round(found.seconds, 3), suggest_cpu_seconds=round(found.cpu_seconds, 3)
    )
