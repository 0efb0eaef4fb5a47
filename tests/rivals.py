"""Runs of the benchmark's rivals."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks.objective import BudgetSpent, Objective
from raybilevel.problems.synthetic import SeveralOptima


def until_spent(rival: Callable[[Objective, int], None], budget: float) -> tuple[Objective, list[float], float]:
    """A search of two hyperparameters with several optima, all its values of F, and the lowest that there is."""
    problem = SeveralOptima(dimension=2)
    assert problem.space is not None
    objective = Objective(problem, problem.space, 0, budget)
    with pytest.raises(BudgetSpent):
        rival(objective, 0)
    return objective, [o.upper_loss for o in objective.observed if o.upper_loss is not None], problem.optimum
