"""F(x, y*(x)) with its price: what every method of the benchmark is run on."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from raybilevel._lower.training import TrainedLowerLevel, train
from raybilevel._metrics import problem_metrics
from raybilevel._records.incumbents import lowest
from raybilevel._records.record import Observation
from raybilevel.errors import NotFiniteError
from raybilevel.problem import BilevelProblem
from raybilevel.space import Space


class BudgetSpent(Exception):  # noqa: N818  not an error: how a method that never ends is ended
    """The cost has reached the budget."""


class Objective:
    """Trains where it is asked to, writes down what was seen, and stops the method when the budget is spent.

    A training costs 1; other gradient evaluations are charged as a share of those of the run's average training, as
    `SearchState.costs` does.

    clock: when each training ended, in trainings, where time is simulated: that is then its cost.
    """

    def __init__(self, problem: BilevelProblem, space: Space, seed: int, budget: float) -> None:
        self.problem, self.space, self.seed, self.budget = problem, space, seed, budget
        self.observed: list[Observation] = []
        self.charged = 0.0
        self.clock: Sequence[float] | None = None
        self.began = time.perf_counter()

    @property
    def passes_per_training(self) -> float:
        """Gradient evaluations that a training takes on average; 1 before the first."""
        done = [o.passes for o in self.observed if o.status == "done"]
        return max(1e-12, sum(done) / len(done)) if done else 1.0

    def note(self, **trace: Any) -> None:
        """What the method says about the newest training."""
        newest = self.observed[-1]
        self.observed[-1] = newest.model_copy(update={"trace": newest.trace | trace})

    def costs(self) -> list[float]:
        """The cost when each training ended."""
        if self.clock is not None:
            return list(self.clock)
        return [number + o.extra_passes / self.passes_per_training for number, o in enumerate(self.observed, 1)]

    @property
    def cost(self) -> float:
        return len(self.observed) + self.charged / self.passes_per_training

    def charge(self, passes: float) -> None:
        """Gradient evaluations outside a training."""
        self.charged += passes

    def value(self, unit: Tensor) -> float:
        """F after a training at a point of the unit cube, shape (d,); the worst F so far where the training fails."""
        trained, _ = self.train(unit)
        return self.worst() if trained is None else trained.upper_loss

    def worst(self) -> float:
        """The highest F so far, which stands for that of a training that failed; 1 before there is one."""
        return max((o.upper_loss for o in self.observed if o.upper_loss is not None), default=1.0)

    def train(self, unit: Tensor, trace: Mapping[str, Any] | None = None) -> tuple[TrainedLowerLevel | None, bytes]:
        """A training and its checkpoint; None where it diverged, which costs as much.

        Raises:
            BudgetSpent: before the training, if there is nothing left for it.
        """
        # 1e-9: the cost is a sum of shares, with rounding errors.
        if self.cost >= self.budget - 1e-9:
            raise BudgetSpent
        unit = unit.detach().double().clamp(0, 1)
        config = self.space.to_config(unit)
        trained, checkpoint = None, b""
        # A training that diverges is noted like any other, and so is its cost.
        with contextlib.suppress(NotFiniteError):
            trained, checkpoint = train(self.problem, config, self.seed)
        self.observed.append(self._observation(unit, config, trained, trace or {}))
        return trained, checkpoint

    def _observation(
        self, unit: Tensor, config: Mapping[str, Any], trained: TrainedLowerLevel | None, trace: Mapping[str, Any]
    ) -> Observation:
        """What was seen of the newest training; its cost is known when the run has ended."""
        found = Observation(
            status="failed" if trained is None else "done",
            unit=tuple(unit.tolist()),
            hyperparameters=dict(config),
            epochs=self.problem.epochs * (len(self.observed) + 1),
            extra_passes=self.charged,
            seconds=round(time.perf_counter() - self.began, 3),
            incumbent=lowest([*(o.upper_loss for o in self.observed), trained.upper_loss if trained else None]),
            trace=dict(trace),
        )
        if trained is None:
            return found
        return found.model_copy(
            update={
                "upper_loss": trained.upper_loss,
                "lower_loss": trained.lower_loss,
                "metrics": problem_metrics(trained.metrics),
                "passes": trained.passes,
            }
        )

    def observations(self) -> tuple[Observation, ...]:
        """All trainings, with their costs."""
        costs = (round(cost, 4) for cost in self.costs())
        return tuple(
            o.model_copy(update={"cost": cost, "spent": cost}) for o, cost in zip(self.observed, costs, strict=True)
        )


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
