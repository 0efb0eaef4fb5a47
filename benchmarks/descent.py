"""`method="hypergradient"` in this process: one descent, charged for its gradients, and a training at its best x."""

from __future__ import annotations

import torch

from benchmarks.objective import Objective
from raybilevel.hypergradient import BilevelDescent, DescentSettings


def descent(objective: Objective, seed: int) -> None:
    """With default settings, from the centre of the box, whose training says what gradients cost. It ends early when no
    more than the cost of the last training is left."""
    space = objective.space
    centre = torch.full((space.dimension,), 0.5, dtype=torch.double)
    objective.value(centre)
    found = BilevelDescent(objective.problem, space.to_config(centre), DescentSettings(), space, seed)
    while not found.finished:
        # The next step is taken to cost what the last did.
        before = found.passes
        found.run_step()
        objective.charge(found.passes - before)
        last = (found.passes - before) / objective.passes_per_training
        if objective.cost + last > objective.budget - 1:
            break
    objective.value(found.best[1].cpu().double())
