"""How long trainings and upper-level steps take, and whether a step is worth waiting for."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

WORKER_START_S = 4.0
"""Time that a worker takes to start and to import torch."""
NEWEST = 9
"""Steps and trainings of which the median is taken."""


@dataclass(frozen=True)
class StepTime:
    """When an upper-level step was begun and its result heard, in seconds on `time.monotonic`."""

    number: int
    began: float
    ended: float


class Pace:
    """Times of upper-level steps and of the newest trainings.

    Tune keeps one idle worker and ends the others while it has no next trial for them (with `PatientFIFO` it keeps all
    for a while). A new worker takes seconds to start. If another training ends first, Tune stops the one that is
    starting. With trainings shorter than a worker's start, one worker soon does all the work. If the driver waits for a
    step instead, the next trial is there before Tune handles the next result, and all workers stay.

    clock: seconds, from anywhere.
    steps: the steps whose results have arrived.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.steps: list[StepTime] = []
        self._begun: dict[int, float] = {}
        self._trainings: deque[tuple[float, float]] = deque(maxlen=NEWEST)

    def trained(self, seconds: float, reports: int = 1) -> None:
        """A training has ended after so many seconds and reports."""
        self._trainings.append((seconds, seconds / max(1, reports)))

    @property
    def short(self) -> bool:
        """Trainings take less than a worker's start: one more training costs less than losing a worker."""
        return bool(self._trainings) and statistics.median(seconds for seconds, _ in self._trainings) < WORKER_START_S

    def step_begun(self, number: int) -> None:
        self._begun[number] = self._clock()

    def step_ended(self, number: int) -> None:
        self.steps.append(StepTime(number, self._begun.pop(number), self._clock()))

    def steps_cancelled(self) -> None:
        self._begun.clear()

    def patience(self, slots: int) -> float:
        """Seconds to wait for the steps under way, at most a worker's start.

        It is 0 in three cases. Steps are not much shorter than a worker's start. Or one step after the other could not
        keep up with so many slots, even if each training needed a new worker. Or the other trainings, whose reports
        wait for the driver meanwhile, would lose more time than one worker's start.
        """
        if not self._begun or not self._trainings:
            return 0.0
        training, between = map(statistics.median, zip(*self._trainings, strict=True))
        newest = self.steps[max(1, len(self.steps) - NEWEST) :]  # without the first, whose worker had to start
        if not newest and training > 3 * WORKER_START_S:
            return 0.0  # too much to lose by a step of unknown length
        step = statistics.median(one.ended - one.began for one in newest) if newest else 0.0
        held_up = step * min(1.0, step / (2 * max(between, 1e-9)))  # how long one of them is, by one step, on average
        if step > WORKER_START_S / 2 or (slots - 1) * held_up > WORKER_START_S:
            return 0.0
        if slots * step > training + step + WORKER_START_S:
            return 0.0
        age = self._clock() - min(self._begun.values())
        return max(0.0, (1 if self.steps else 2) * WORKER_START_S - age)
