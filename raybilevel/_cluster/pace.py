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

    By itself Tune keeps one idle process of those that train (with `PatientFIFO` all of them for a while), and ends the
    others while it has no next trial for them. A new one
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
        self._trainings: deque[tuple[float, float]] = deque(maxlen=NEWEST)

    def trained(self, seconds: float, reports: int = 1) -> None:
        """A training took so long and reported so often, the last time at its end."""
        self._trainings.append((seconds, seconds / max(1, reports)))

    @property
    def short(self) -> bool:
        """Trainings take less than the start of a process: one more costs less than to let a process go."""
        return bool(self._trainings) and statistics.median(seconds for seconds, _ in self._trainings) < PROCESS_START

    def step_begun(self, number: int) -> None:
        self._begun[number] = self._clock()

    def step_ended(self, number: int) -> None:
        self.steps.append(StepTime(number, self._begun.pop(number), self._clock()))

    def steps_cancelled(self) -> None:
        self._begun.clear()

    def patience(self, slots: int) -> float:
        """Seconds that the steps under way are worth waiting for, at most what a new process would take.

        0 where steps are not much shorter than that; where steps that wait for each other could not keep up with so
        many slots, even if each training's process had to start; and where the other trainings, which wait for the
        driver when they report, would lose more by it than one process's start.
        """
        if not self._begun or not self._trainings:
            return 0.0
        training, between = map(statistics.median, zip(*self._trainings, strict=True))
        newest = self.steps[max(1, len(self.steps) - NEWEST) :]  # the first one's process had to start
        if not newest and training > 3 * PROCESS_START:
            return 0.0  # too much to lose by a step of unknown length
        step = statistics.median(one.ended - one.began for one in newest) if newest else 0.0
        held_up = step * min(1.0, step / (2 * max(between, 1e-9)))  # how long one of them is, by one step, on average
        if step > PROCESS_START / 2 or (slots - 1) * held_up > PROCESS_START:
            return 0.0
        if slots * step > training + step + PROCESS_START:
            return 0.0
        age = self._clock() - min(self._begun.values())
        return max(0.0, (1 if self.steps else 2) * PROCESS_START - age)
