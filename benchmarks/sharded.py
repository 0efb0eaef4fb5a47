"""Several searches side by side, each with a part of the box, that share what they observed: in simulated time.

A driver serves the trials of one search. Where that is not enough, the box is cut into parts, each with a search and a
driver. What all of them observed goes into one store. The parts overlap, and each search takes what lies in its own one
from the store into its model of F. The store also decides how many of the slots each of them has: half of the slots are
shared evenly, the other half belongs to the part with the lowest F so far.
"""

from __future__ import annotations

import heapq
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from raybilevel._lower.training import load_checkpoint, train
from raybilevel.methods._default import Default
from raybilevel.problem import BilevelProblem
from raybilevel.problems.synthetic import SeveralOptima
from raybilevel.search._local import observe
from raybilevel.search._optimizer import BilevelOptimizer, Observation
from raybilevel.space import Space

T = TypeVar("T")
STEP = 0.2
"""Simulated time of an upper-level step; a training takes 1 on average (lognormal, sigma 0.3)."""
OVERLAP = 0.1
"""How far a part that shares what it observed reaches beyond each cut, as a share of the part's width."""


def parts_of(space: Space, count: int, overlap: float = 0.0) -> list[Space]:
    """The box cut in halves, along one hyperparameter after another, until there are `count` parts (a power of two).

    overlap: how far each part reaches into the next one, as a share of its width.
    """
    boxes = [space]
    cut = 0
    while len(boxes) < count:
        boxes = [half for box in boxes for half in halves(box, cut % space.dimension, overlap)]
        cut += 1
    return boxes


def halves(box: Space, at: int, overlap: float) -> list[Space]:
    one = box.parameters[at]
    lower, upper = replace(one, high=one.to_value((1 + overlap) / 2)), replace(one, low=one.to_value((1 - overlap) / 2))
    return [Space((*box.parameters[:at], half, *box.parameters[at + 1 :])) for half in (lower, upper)]


@dataclass
class Driver:
    """A search of one part of the box, what its trainings left, and the processor time that it took to drive."""

    search: BilevelOptimizer
    checkpoints: dict[int, bytes] = field(default_factory=dict)
    asked: int = 0
    busy: int = 0
    seconds: float = 0.0

    def timed(self, call: Callable[[], T]) -> T:
        begun = time.process_time()
        answer = call()
        self.seconds += time.process_time() - begun
        return answer


@dataclass(frozen=True)
class Outcome:
    """best: the lowest F after each training that ended, in order; seconds: of the busiest driver."""

    best: list[float]
    seconds: float


def run(problem: SeveralOptima, count: int, slots: int, trainings: int, share: bool, seed: int) -> Outcome:
    """So many searches on so many slots in all, until so many trainings have been begun in all."""
    chance = random.Random(seed)
    drivers = [
        Driver(BilevelOptimizer(box, Default(), seed + number, slots // count))
        for number, box in enumerate(parts_of(problem.space, count, OVERLAP if share else 0.0))
    ]
    store: list[tuple[float, int]] = []  # F, and whose part
    best: list[float] = []
    events: list[tuple[float, int, int, Any]] = []
    now, order = 0.0, 0

    def begin(number: int) -> bool:
        """Something of this search on a free slot; False if it has nothing to do."""
        nonlocal order
        driver = drivers[number]
        trial = str(driver.asked)
        what: Any
        if driver.timed(lambda: driver.search.ask(trial)) is not None:
            driver.asked += 1
            # A mean of exp(-0.045 + 0.3^2 / 2) = 1.
            what, seconds = trial, math.exp(chance.gauss(-0.045, 0.3))
        elif (step := driver.timed(driver.search.plan)) is not None:
            what, seconds = step, STEP
        else:
            return False
        driver.busy += 1
        order += 1
        heapq.heappush(events, (now + seconds, order, number, what))
        return True

    while True:
        if sum(driver.asked for driver in drivers) < trainings:
            if share and store:
                leader = min(store)[1]
                for number, driver in enumerate(drivers):
                    # Half of the slots for all alike, the other half for the part with the lowest F.
                    driver.search.slots = max(1, slots // 2 // count) + (slots // 2 if number == leader else 0)
            for number, driver in enumerate(drivers):
                # All drivers share the slots, whatever each may have at most.
                free = slots - sum(other.busy for other in drivers)
                while free > 0 and driver.busy < driver.search.slots and begin(number):
                    free -= 1
        if not events:
            return Outcome(best, max(driver.seconds for driver in drivers))
        # The next that ends.
        now, _, number, what = heapq.heappop(events)
        driver = drivers[number]
        driver.busy -= 1
        if isinstance(what, str):
            config, upper = driver.search.config(what), finish_training(problem, driver, what, seed)
            store.append((upper, number))
            best.append(min(store)[0])
            if share:
                for other in drivers:
                    take(other, driver, f"{number}-{what}", config, upper)
        else:
            finish_step(problem, driver, what)


def finish_training(problem: BilevelProblem, driver: Driver, trial: str, seed: int) -> float:
    search = driver.search
    config = search.config(trial)
    trained, driver.checkpoints[search.trials[trial]] = train(problem, config, seed)
    driver.timed(lambda: search.tell(trial, observe(search.space, config, trained)))
    return trained.upper_loss


def take(driver: Driver, source: Driver, trial: str, config: dict[str, Any], upper: float) -> None:
    """What another search observed, from the store, where it lies in this one's part."""
    if driver is not source and driver.search.space.contains(config):
        # complete=False: of F alone. Its weights, and so its gradients, stay with the search that trained it.
        driver.timed(lambda: driver.search.add(trial, config, Observation(upper, complete=False)))


def finish_step(problem: BilevelProblem, driver: Driver, step: Any) -> None:
    result = driver.search.run(problem, {}, step, lambda index: load_checkpoint(driver.checkpoints[index]))
    driver.timed(lambda: driver.search.tell_step(step.number, result))


def sharded(slots: int = 16, trainings: int = 64, counts: tuple[int, ...] = (1, 4), seeds: int = 4) -> None:
    problem = SeveralOptima(dimension=5, wells=12, rise=0.04)
    print(
        f"{slots} slots in all, {trainings} trainings, {problem.dimension} hyperparameters, {problem.wells} local "
        f"optima; F less the lowest there is, mean of {seeds} runs (and the worst):"
    )
    marks = [trainings // 4, trainings // 2, trainings]
    for count in counts:
        for share in (False, True) if count > 1 else (False,):
            outcomes = [run(problem, count, slots, trainings, share, seed) for seed in range(seeds)]
            cells = []
            for mark in marks:
                gaps = [outcome.best[mark - 1] - problem.optimum for outcome in outcomes]
                cells.append(f"after {mark} {sum(gaps) / seeds:.4f} ({max(gaps):.4f})")
            seconds = sum(outcome.seconds for outcome in outcomes) / seeds
            name = f"{count} search{'es' if count > 1 else ''}{', one store' if share else ''}"
            print(
                f"  {name:22} {'; '.join(cells)}; busiest driver {1e3 * seconds / trainings:.2f} ms a training of all",
                flush=True,
            )
