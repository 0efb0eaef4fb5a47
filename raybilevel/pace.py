"""How long trainings and upper-level steps take, and whether a step is worth waiting for."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

PROCESS_START = 4.0
"""Seconds that a process takes to start and to import torch."""
NEWEST = 9


@dataclass(frozen=True)
class StepTime:
    """When an upper-level step was begun and its result heard, in seconds on `time.monotonic`."""

    number: int
    began: float
    ended: float


class Pace:
    """Times of upper-level steps and of the newest trainings.

    Tune keeps one idle process of those that train, and ends the others while it has no next trial for them. A new one
    takes seconds to start, and Tune takes it back when another training ends first: with trainings that are shorter
    than that, soon one process does all the work. If the driver waits for a step instead, Tune hears of the next
    training's end when the trial for the process before has been made, and all processes live on.

    clock: seconds, from anywhere.
    steps: those whose results were heard.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.steps: list[StepTime] = []
        self._begun: dict[int, float] = {}
        self._trainings: deque[float] = deque(maxlen=NEWEST)

    def trained(self, seconds: float) -> None:
        self._trainings.append(seconds)

    def step_begun(self, number: int) -> None:
        self._begun[number] = self._clock()

    def step_ended(self, number: int) -> None:
        self.steps.append(StepTime(number, self._begun.pop(number), self._clock()))

    def steps_cancelled(self) -> None:
        self._begun.clear()

    def patience(self, slots: int) -> float:
        """Seconds that the steps under way are worth waiting for, at most what a new process would take.

        0 where trainings take much longer than that, or steps not much shorter; and where steps that wait for each
        other could not keep up with so many slots, even if each training's process had to start.
        """
        if not self._begun or not self._trainings:
            return 0.0
        training = statistics.median(self._trainings)
        newest = self.steps[max(1, len(self.steps) - NEWEST) :]  # the first one's process had to start
        step = statistics.median(one.ended - one.began for one in newest) if newest else 0.0
        if training > 3 * PROCESS_START or step > PROCESS_START / 2:
            return 0.0
        if slots * step > training + step + PROCESS_START:
            return 0.0
        age = self._clock() - min(self._begun.values())
        return max(0.0, (1 if self.steps else 2) * PROCESS_START - age)
