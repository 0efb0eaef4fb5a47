"""raybilevel's own methods, driven through ask/tell in this process."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from benchmarks.objective import BudgetSpent, Objective, Observed
from raybilevel._lower.training import load_checkpoint
from raybilevel.methods import make_method
from raybilevel.methods._base import UpperStep
from raybilevel.methods._trust_region import TrustRegionRule
from raybilevel.search import check_problem
from raybilevel.search._local import observe
from raybilevel.search._optimizer import BilevelOptimizer


def configured(name: str, settings: Mapping[str, Any]) -> Any:
    """A method by name; `region` may be given as a mapping of its rule's settings."""
    given = dict(settings)
    if isinstance(given.get("region"), Mapping):
        given["region"] = TrustRegionRule(**given["region"])
    return make_method(name, **given)


def bilevel(
    objective: Objective, seed: int, method: str, settings: Mapping[str, Any], slots: int = 1
) -> list[dict[str, Any]]:
    """Trainings and upper-level steps in `slots` slots until the budget is spent; what each step said.

    With one slot the clock is the cost. With more it is simulated: trainings and steps last as long as the gradient
    evaluations they take, and end in that order; an observation's cost is then when it ended, in trainings.
    """
    optimizer = BilevelOptimizer(objective.space, configured(method, settings), seed, slots)
    check_problem(objective.problem, objective.space)
    checkpoints: dict[int, bytes] = {}
    steps: list[dict[str, Any]] = []
    under_way: list[tuple[float, int, Callable[[], None]]] = []
    ended: list[tuple[float, Observed]] = []
    clock, count = 0.0, itertools.count()

    def begin(passes: float, end: Callable[[], None]) -> None:
        heapq.heappush(under_way, (clock + passes / objective.passes_per_training, next(count), end))

    def take(step: UpperStep) -> None:
        result = optimizer.run(objective.problem, {}, step, lambda index: load_checkpoint(checkpoints[index]))
        record = result.record
        steps.append(
            {
                "number": step.number,
                "origin": step.origin,
                "centre": step.centre,
                "targets": list(step.targets),
                "radius": step.radius,
                "passes": record.passes,
                "multiplier": record.multiplier,
                "violation": record.violation,
                "decrease": record.decrease,
                "hypergradients": {str(i): list(g) for i, g in result.hypergradients.items()},
            }
        )

        def end() -> None:
            optimizer.tell_step(step.number, result)
            objective.charge(record.passes)

        begin(record.passes, end)

    def train(trial: str) -> None:
        index = optimizer.trials[trial]
        training = optimizer.state.trainings[index]
        proposal = training.proposal
        trace = {
            "index": index,
            "origin": proposal.origin,
            "region": proposal.region,
            "predicted_upper_loss": proposal.predicted_upper_loss,
            "predicted_value": proposal.predicted_value,
            "deviation": proposal.deviation,
            "violation": proposal.violation,
            "step": steps[-1]["number"] if steps and proposal.origin not in ("start", "given") else None,
        }
        unit = torch.tensor(training.unit, dtype=torch.double)
        trained, checkpoints[index] = objective.train(unit, trace)
        observed = objective.observed[-1]

        def end() -> None:
            config = objective.space.to_config(unit)
            optimizer.tell(trial, None if trained is None else observe(objective.space, config, trained))
            incumbent = optimizer.method.incumbent(optimizer.state)
            if incumbent is not None:
                observed.incumbent = incumbent.index
            ended.append((clock, observed))

        begin(objective.passes_per_training if trained is None else trained.passes, end)

    try:
        while True:
            while (step := optimizer.plan()) is not None:
                take(step)
            while optimizer.queue and len(optimizer.state.pending) + len(optimizer.running) < slots:
                trial = str(len(optimizer.state.trainings))
                optimizer.ask(trial)
                train(trial)
            if not under_way or clock >= objective.budget / slots:
                break
            clock, _, end = heapq.heappop(under_way)
            end()
    except BudgetSpent:
        pass
    if slots > 1:
        in_order(objective, ended)
    return steps


def in_order(objective: Objective, ended: Sequence[tuple[float, Observed]]) -> None:
    """Keep the trainings that ended, in the order in which they did."""
    place = {observed.trace["index"]: position for position, (_, observed) in enumerate(ended)}
    for position, (clock, observed) in enumerate(ended):
        observed.cost, observed.incumbent = round(clock, 4), place.get(observed.incumbent, position)
    objective.observed = [observed for _, observed in ended]
