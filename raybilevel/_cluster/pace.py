"""How long trainings and upper-level steps take, and whether a step is worth waiting for."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

WORKER_START_S = 4.0
"""Time that a worker takes to start and to import torch."""
MEDIAN_WINDOW = 9
"""Medians are over this many of the newest steps or trainings."""


@dataclass(frozen=True)
class StepTime:
    """When an upper-level step began and when its result arrived, in seconds of `time.monotonic`."""

    number: int
    began: float
    ended: float


class Pace:
    """Times of upper-level steps and of the newest trainings.

    Tune keeps one idle worker and stops the others while it has no next trial for them. (With `PatientFIFO` it keeps
    all of them for a while.) A new worker takes seconds to start. If another training ends first, Tune stops the worker
    that is starting. If trainings are shorter than a worker's start, one worker soon does all the work. So the driver
    waits for a step instead: the next trial is then there before Tune handles the next result, and all workers stay.

    clock: returns seconds, from any origin.
    steps: the steps whose results have arrived.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.steps: list[StepTime] = []
        self._begun: dict[int, float] = {}
        self._trainings: deque[tuple[float, float]] = deque(maxlen=MEDIAN_WINDOW)

    def trained(self, seconds: float, reports: int = 1) -> None:
        """Note that a training has ended, after this many seconds and reports."""
        self._trainings.append((seconds, seconds / max(1, reports)))

    @property
    def short(self) -> bool:
        """Whether trainings take less than a worker's start. Then an extra training is cheaper than a lost worker."""
        return bool(self._trainings) and statistics.median(seconds for seconds, _ in self._trainings) < WORKER_START_S

    def step_begun(self, number: int) -> None:
        self._begun[number] = self._clock()

    def step_ended(self, number: int) -> None:
        self.steps.append(StepTime(number, self._begun.pop(number), self._clock()))

    def steps_cancelled(self) -> None:
        self._begun.clear()

    def patience(self, slots: int) -> float:
        """Seconds to wait for the steps under way: at most a worker's start, twice that for the first step.

        It is 0 in three cases. Steps are not much shorter than a worker's start. Or steps one after the other could not
        keep up with this many slots, even if each training needed a new worker. Or the reports of the other trainings,
        which wait for the driver meanwhile, would lose more time than a worker's start.
        """
        if not self._begun or not self._trainings:
            return 0.0
        training, between = map(statistics.median, zip(*self._trainings, strict=True))
        newest = self.steps[max(1, len(self.steps) - MEDIAN_WINDOW) :]  # not the first, whose worker had to start
        if not newest and training > 3 * WORKER_START_S:
            return 0.0  # a step of unknown length could hold up too much work
        step = statistics.median(one.ended - one.began for one in newest) if newest else 0.0
        # Mean seconds by which one step delays another training's next report. A report that falls into the step waits
        # for half of it on average, and one falls into it with probability step / between.
        held_up = step * min(1.0, step / (2 * max(between, 1e-9)))
        if step > WORKER_START_S / 2 or (slots - 1) * held_up > WORKER_START_S:
            return 0.0
        # In the time of a training, a step and a new worker each slot needs one step.
        if slots * step > training + step + WORKER_START_S:
            return 0.0
        age = self._clock() - min(self._begun.values())
        # The first step's worker has to start and to import before the step begins.
        return max(0.0, (1 if self.steps else 2) * WORKER_START_S - age)
