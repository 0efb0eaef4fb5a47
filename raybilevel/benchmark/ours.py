"""raybilevel's own methods, driven through ask/tell in this process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from raybilevel.benchmark.objective import BudgetSpent, Objective
from raybilevel.levels import check_problem
from raybilevel.local import observe
from raybilevel.lower_level import load_checkpoint
from raybilevel.methods import make_method
from raybilevel.optimizer import BilevelOptimizer
from raybilevel.trust_region import TrustRegionRule


def configured(name: str, settings: Mapping[str, Any]) -> Any:
    """A method by name; `region` may be given as a mapping of its rule's settings."""
    given = dict(settings)
    if isinstance(given.get("region"), Mapping):
        given["region"] = TrustRegionRule(**given["region"])
    return make_method(name, **given)


def bilevel(objective: Objective, seed: int, method: str, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One training after another until the budget is spent; what each upper-level step said."""
    optimizer = BilevelOptimizer(objective.space, configured(method, settings), seed)
    check_problem(objective.problem, objective.space)
    checkpoints: dict[int, bytes] = {}
    steps: list[dict[str, Any]] = []
    try:
        while not optimizer.exhausted and objective.cost < objective.budget:
            while (step := optimizer.plan()) is not None:
                result = optimizer.method.run(
                    objective.problem,
                    objective.space,
                    {},
                    step,
                    lambda index: load_checkpoint(checkpoints[index]),
                    optimizer.memory,
                )
                optimizer.tell_step(step.number, result)
                objective.charge(result.record.passes)
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
            trial = str(len(optimizer.state.trainings))
            if optimizer.ask(trial) is None:
                break
            index = optimizer.trials[trial]
            training = optimizer.state.trainings[index]
            proposal = training.proposal
            trace = {
                "index": index,
                "origin": proposal.origin,
                "region": proposal.region,
                "predicted_upper": proposal.predicted_upper,
                "predicted_value": proposal.predicted_value,
                "deviation": proposal.deviation,
                "violation": proposal.violation,
                "step": steps[-1]["number"] if steps and proposal.origin not in ("start", "given") else None,
            }
            unit = torch.tensor(training.unit, dtype=torch.double)
            trained, checkpoints[index] = objective.train(unit, trace)
            config = objective.space.suggest(unit)
            optimizer.tell(trial, None if trained is None else observe(objective.space, config, trained))
            incumbent = optimizer.method.incumbent(optimizer.state)
            if incumbent is not None:
                objective.observed[-1].incumbent = incumbent.index
    except BudgetSpent:
        pass
    return steps
