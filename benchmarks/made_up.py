"""A problem, and made-up results of its trainings and steps, for benchmarks of what a search costs its driver."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import torch
from ray import tune
from torch import Tensor, nn

from raybilevel.methods._base import UpperResult, UpperStep
from raybilevel.problem import BilevelProblem, Hyperparameters, Level
from raybilevel.search_state import Proposal, SearchState, StepRecord, Training

DIMENSION = 20


class Quadratic(BilevelProblem):
    """f = |y - x|^2 / 2, solved by one step; `megabytes` of data travel along."""

    epochs = 1
    dtype = torch.double

    def __init__(self, dimension: int = DIMENSION, megabytes: float = 0.0) -> None:
        self.dimension = dimension
        # Tensors of 8 kB, 125 of which are a megabyte.
        self.data = [torch.zeros(1000, dtype=torch.double) for _ in range(int(megabytes * 125))]

    def model(self) -> nn.Module:
        return nn.Linear(self.dimension, 1, bias=False)

    def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Any) -> Tensor:
        x = torch.stack([hyperparameters[f"x{i}"] for i in range(self.dimension)])
        return (model.get_parameter("weight")[0] - x).square().sum() / 2

    def upper_loss(self, model: nn.Module, batch: Any) -> Tensor:
        return (model.get_parameter("weight") - 0.3).square().sum()

    def batches(self, level: Level, generator: torch.Generator | None) -> Iterator[Tensor]:
        yield torch.zeros(1, dtype=torch.double)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        # f has curvature 1.
        return torch.optim.SGD(model.parameters(), lr=1.0)


def space(dimension: int = DIMENSION) -> dict[str, Any]:
    return {f"x{i}": tune.uniform(-1.0, 1.0) for i in range(dimension)}


class Answers:
    """Made-up results of trainings and steps: what they hold costs the driver the same as real ones."""

    def __init__(self, dimension: int = DIMENSION, seed: int = 0) -> None:
        self.dimension, self.random = dimension, random.Random(seed)

    def point(self) -> tuple[float, ...]:
        return tuple(self.random.random() for _ in range(self.dimension))

    def training(self) -> dict[str, Any]:
        return {
            "upper_loss": self.random.random(),
            "lower_loss": self.random.random(),
            "lower_passes": 3.0,
            "lower_level_finished": True,
            "trial_path": "/storage/experiment/trial",
            "checkpoint_dir_name": "checkpoint_000000",
            **{f"lower_gradient/x{i}": value for i, value in enumerate(self.point())},
        }

    def history(self, count: int) -> SearchState:
        """A search that has run: regions of ten trainings each, a step before every training."""
        trainings = []
        for index in range(count):
            # Each tenth training begins a region, named by its index.
            region = index - index % 10 if index % 10 else None
            proposal = Proposal(self.point(), "region", region, 0.5, 0.5, 0.1)
            value, upper = self.random.random(), self.random.random()
            found = Training(index, proposal, "done", index, value, upper, self.point(), 3.0, self.point())
            trainings.append(found)
        steps = [
            StepRecord(index, index, 1.0, multiplier=1.0, violation=0.0, decrease=0.05, finished=index)
            for index in range(count)
        ]
        return SearchState(tuple(trainings), tuple(steps))

    def step(self, step: UpperStep) -> UpperResult:
        proposal = Proposal(self.point(), step.origin, step.region, 0.5, 0.5, 0.1)
        record = StepRecord(step.number, step.centre, 1.0, multiplier=1.0, decrease=0.05)
        return UpperResult(record, proposal, {index: self.point() for index in step.targets})
