"""F(x, y*(x)) with its price: what every method of the benchmark is run on."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from raybilevel._lower.training import TrainedLowerLevel, train
from raybilevel.errors import NotFiniteError
from raybilevel.problem import BilevelProblem
from raybilevel.space import Space


class BudgetSpent(Exception):  # noqa: N818  not an error: how a method that never ends is ended
    """The cost has reached the budget."""


@dataclass
class Observed:
    """One lower-level training.

    upper, lower: F and f at the trained weights; None where the training failed.
    metrics:      what the problem's `evaluate` returned, e.g. {"test_loss": ...}.
    passes:       gradient evaluations of the training.
    extra:        gradient evaluations before it ended that belong to no training: upper-level steps, linear solves.
    incumbent:    index of the observation that the method would return now.
    trace:        what the method says about this point.
    """

    unit: list[float]
    hyperparameters: dict[str, Any]
    upper: float | None
    lower: float | None
    metrics: Mapping[str, float]
    passes: float
    extra: float
    seconds: float
    incumbent: int
    trace: dict[str, Any] = field(default_factory=dict)
    cost: float = math.nan

    def plain(self) -> dict[str, Any]:
        return asdict(self)


class Objective:
    """Trains where it is asked to, writes down what was seen, and stops the method when the budget is spent.

    A training costs 1; other gradient evaluations are charged as a share of those of the run's average training, as
    `SearchState.costs` does.
    """

    def __init__(self, problem: BilevelProblem, space: Space, seed: int, budget: float) -> None:
        self.problem, self.space, self.seed, self.budget = problem, space, seed, budget
        self.observed: list[Observed] = []
        self.charged = 0.0
        self.began = time.perf_counter()

    @property
    def passes_per_training(self) -> float:
        done = [o.passes for o in self.observed if o.upper is not None]
        return max(1e-12, sum(done) / len(done)) if done else 1.0

    def costs(self) -> list[float]:
        """The cost when each training ended."""
        return list(itertools.accumulate(1 + o.extra / self.passes_per_training for o in self.observed))

    @property
    def cost(self) -> float:
        spent = self.costs()[-1] if self.observed else 0.0
        return spent + self.charged / self.passes_per_training

    def charge(self, passes: float) -> None:
        """Gradient evaluations outside a training."""
        self.charged += passes

    @property
    def best(self) -> int:
        """Index of the lowest F; 0 before there is one."""
        return lowest(o.upper for o in self.observed)

    def value(self, unit: Tensor) -> float:
        """F after a training at a point of the unit cube, shape (d,); the worst F so far where the training fails."""
        trained, _ = self.train(unit)
        if trained is not None:
            return trained.upper_loss
        return max((o.upper for o in self.observed if o.upper is not None), default=1.0)

    def train(self, unit: Tensor, trace: Mapping[str, Any] | None = None) -> tuple[TrainedLowerLevel | None, bytes]:
        """A training and its checkpoint; None where it diverged, which costs as much.

        Raises:
            BudgetSpent: before the training, if there is nothing left for it.
        """
        if self.cost >= self.budget - 1e-9:
            raise BudgetSpent
        unit = unit.detach().double().clamp(0, 1)
        config = self.space.to_config(unit)
        trained, checkpoint = None, b""
        with contextlib.suppress(NotFiniteError):
            trained, checkpoint = train(self.problem, config, self.seed)
        self.observed.append(
            Observed(
                unit.tolist(),
                config,
                trained.upper_loss if trained else None,
                trained.lower_loss if trained else None,
                trained.metrics if trained else {},
                trained.passes if trained else 0.0,
                self.charged,
                round(time.perf_counter() - self.began, 3),
                0,
                dict(trace or {}),
            )
        )
        self.charged = 0.0
        self.observed[-1].incumbent = self.best
        return trained, checkpoint

    def finish(self) -> list[dict[str, Any]]:
        """All observations, with their costs."""
        for observed, cost in zip(self.observed, self.costs(), strict=True):
            if math.isnan(observed.cost):
                observed.cost = round(cost, 4)
        return [observed.plain() for observed in self.observed]


def lowest(uppers: Iterable[float | None]) -> int:
    """Index of the lowest F, where None is a training that failed; 0 before there is one."""
    known = [(upper, i) for i, upper in enumerate(uppers) if upper is not None]
    return min(known)[1] if known else 0


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
