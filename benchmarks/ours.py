"""raybilevel's own methods, driven through ask/tell in this process."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.objective import BudgetSpent, Objective
from raybilevel._lower.training import load_checkpoint
from raybilevel._records.record import Step
from raybilevel.methods import make_method
from raybilevel.methods._base import UpperResult, UpperStep
from raybilevel.methods._trust_region import TrustRegionRule
from raybilevel.search import check_problem
from raybilevel.search._local import observe
from raybilevel.search._optimizer import BilevelOptimizer
from raybilevel.search_state import Training


def configured(name: str, settings: Mapping[str, Any]) -> Any:
    """A method by name; `region` may be given as a mapping of its rule's settings."""
    given = dict(settings)
    if isinstance(given.get("region"), Mapping):
        given["region"] = TrustRegionRule(**given["region"])
    return make_method(name, **given)


def bilevel(
    objective: Objective, seed: int, method: str, settings: Mapping[str, Any], slots: int = 1
) -> tuple[Step, ...]:
    """Trainings and upper-level steps in `slots` slots until the budget is spent; what each step said.

    With one slot the clock is the cost. With more it is simulated: trainings and steps last as long as the gradient
    evaluations they take, and end in that order; an observation's cost is then when it ended, in trainings.
    """
    space = check_problem(objective.problem, objective.space)
    drive = Drive(objective, BilevelOptimizer(space, configured(method, settings), seed, slots), slots)
    drive.run()
    return tuple(drive.steps)


@dataclass(frozen=True)
class Ended:
    """A training that has ended.

    clock:     when, in trainings.
    position:  among the objective's observations, in the order in which they began.
    incumbent: position of what the search would return now; None before there is one.
    """

    clock: float
    position: int
    incumbent: int | None


class Drive:
    """A search, and what is under way: a heap by the time at which it ends."""

    def __init__(self, objective: Objective, optimizer: BilevelOptimizer, slots: int) -> None:
        self.objective, self.optimizer, self.slots = objective, optimizer, slots
        self.checkpoints: dict[int, bytes] = {}
        self.steps: list[Step] = []
        self.ended: list[Ended] = []
        self.clock, self._count = 0.0, itertools.count()
        self._under_way: list[tuple[float, int, Callable[[], None]]] = []

    def run(self) -> None:
        """Until the budget is spent, or nothing is left to do."""
        optimizer = self.optimizer
        try:
            while True:
                while (step := optimizer.plan()) is not None:
                    self._take(step)
                while optimizer.queue and len(optimizer.state.pending) + len(optimizer.running) < self.slots:
                    self._train(str(len(optimizer.state.trainings)))
                # The objective's budget is that of all slots together (`suite.execute`).
                if not self._under_way or self.clock >= self.objective.budget / self.slots:
                    break
                self.clock, _, end = heapq.heappop(self._under_way)
                end()
        except BudgetSpent:
            pass
        if self.slots == 1:
            # What has begun is within the budget, which goes by other means of passes than the clock.
            for _, _, end in sorted(self._under_way):
                end()
        self._write_down()

    def _begin(self, passes: float, end: Callable[[], None]) -> None:
        """Something that lasts as long as its gradient evaluations take; `end` is called then."""
        until = self.clock + passes / self.objective.passes_per_training
        # The count breaks ties: functions have no order.
        heapq.heappush(self._under_way, (until, next(self._count), end))

    def _take(self, step: UpperStep) -> None:
        result = self.optimizer.run(
            self.objective.problem, {}, step, lambda index: load_checkpoint(self.checkpoints[index])
        )
        self.steps.append(told(step, result))

        def end() -> None:
            self.optimizer.tell_step(step.number, result)
            self.objective.charge(result.record.passes)

        self._begin(result.record.passes, end)

    def _train(self, trial: str) -> None:
        self.optimizer.ask(trial)
        index = self.optimizer.trials[trial]
        training = self.optimizer.state.trainings[index]
        unit = torch.tensor(training.unit, dtype=torch.double)
        position = len(self.objective.observed)
        # Trained at once. The search is told when the clock has come to its end.
        trained, self.checkpoints[index] = self.objective.train(unit, self._trace(training))

        def end() -> None:
            config = self.objective.space.to_config(unit)
            found = None if trained is None else observe(self.objective.space, config, trained)
            self.optimizer.tell(trial, found)
            incumbent = self.optimizer.method.incumbent(self.optimizer.state)
            self.ended.append(Ended(self.clock, position, None if incumbent is None else incumbent.index))

        self._begin(self.objective.passes_per_training if trained is None else trained.passes, end)

    def _trace(self, training: Training) -> dict[str, Any]:
        """What the search expects of a training."""
        proposal = training.proposal
        return {
            "index": training.index,
            "origin": proposal.origin,
            "region": proposal.region,
            "predicted_upper_loss": proposal.predicted_upper_loss,
            "predicted_value": proposal.predicted_value,
            "deviation": proposal.deviation,
            "violation": proposal.violation,
            "step": self.steps[-1].number if self.steps and proposal.origin not in ("start", "given") else None,
        }

    def _write_down(self) -> None:
        """The incumbents of the search; on a simulated clock only the trainings that ended, in that order."""
        observed = self.objective.observed
        for ended in self.ended:
            if ended.incumbent is not None:
                changed = observed[ended.position].model_copy(update={"incumbent": ended.incumbent})
                observed[ended.position] = changed
        if self.slots == 1:
            return
        place = {ended.position: number for number, ended in enumerate(self.ended)}
        self.objective.clock = [ended.clock for ended in self.ended]
        self.objective.observed = [
            # Positions are in the order of begin, and records in the order of ends.
            observed[e.position].model_copy(update={"incumbent": place.get(observed[e.position].incumbent, number)})
            for number, e in enumerate(self.ended)
        ]


def told(step: UpperStep, result: UpperResult) -> Step:
    """An upper-level step as a record has it."""
    record = result.record
    return Step(
        number=step.number,
        origin=step.origin,
        centre=step.centre,
        targets=tuple(step.targets),
        radius=step.radius,
        passes=record.passes,
        multiplier=record.multiplier,
        violation=record.violation,
        decrease=record.decrease,
        shrinkage=record.shrinkage,
        hypergradients={index: tuple(gradient) for index, gradient in result.hypergradients.items()},
    )
