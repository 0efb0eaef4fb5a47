"""Processor time of upper-level steps: what fitting models and proposing a point takes, and what hypergradients do."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch

from raybilevel.methods._base import UpperResult
from raybilevel.methods._default import Default, Looked
from raybilevel.problems.digits import DigitsLogistic
from raybilevel.search._local import search
from raybilevel.search._optimizer import BilevelOptimizer

FROM, TO = 13, 25
"""Trainings that have ended when a step that counts is taken."""


@dataclass
class Clock:
    """Seconds of the steps that counted, and of the hypergradients among them."""

    steps: int = 0
    whole: float = 0.0
    looked: float = 0.0


@dataclass(frozen=True)
class Timed(Default):
    """The default method, on the clock."""

    clock: Clock = field(default_factory=Clock)

    def run(self, problem: Any, space: Any, constants: Any, step: Any, *rest: Any) -> UpperResult:
        if not FROM <= len(step.state.told) <= TO:
            return super().run(problem, space, constants, step, *rest)
        begun = time.process_time()
        found = super().run(problem, space, constants, step, *rest)
        self.clock.whole += time.process_time() - begun
        self.clock.steps += 1
        return found

    def _look_at(self, problem: Any, space: Any, constants: Any, step: Any, *rest: Any) -> Looked:
        begun = time.process_time()
        found = super()._look_at(problem, space, constants, step, *rest)
        if FROM <= len(step.state.told) <= TO:
            self.clock.looked += time.process_time() - begun
        return found


def step_times(dimensions: tuple[int, ...] = (8, 64)) -> dict[int, float]:
    """Seconds of models and proposals in a step of searches of digits with so many weight decays, on one core."""
    torch.set_num_threads(1)
    found = {}
    for dimension in dimensions:
        problem, method = DigitsLogistic(dimension), Timed()
        search(problem, BilevelOptimizer(problem.space, method, 0), cost=TO)
        clock = method.clock
        found[dimension] = (clock.whole - clock.looked) / clock.steps
        print(
            f"  digits ({dimension}), {clock.steps} steps: {found[dimension]:.3f} s a step, "
            f"and {clock.looked / clock.steps:.3f} s of hypergradients",
            flush=True,
        )
    return found
