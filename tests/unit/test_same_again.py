"""A training that is another one at a second try, or where it is resumed, is warned of."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from raybilevel.problem import Hyperparameters, Level, minibatches
from raybilevel.search import check_problem
from raybilevel.space import Parameter, Space
from tests.problems_for_tests import Network, exact_optimizer

DECAY = Space((Parameter(("decay",), 1e-4, 1.0, log=True),))
OTHER_DATA = "batches('lower', generator) yields other data, or in another order, under the same seed"
OTHER_CHANCE = "lower_loss draws random numbers in train mode that do not follow torch's seed"
OTHER_STEPS = "a training that is resumed from a checkpoint takes other steps than one that goes on"


class Shuffled(Network):
    def batches(self, level: Level, generator: torch.Generator | None) -> Iterable[Any]:
        if generator is None:
            return super().batches(level, None)
        order = np.random.permutation(len(self.x))
        return minibatches((self.x[order], self.y[order]), 8, None)


class Shifted(Network):
    def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Any) -> Tensor:
        if model.training:
            batch = [torch.roll(part, random.randrange(100)) if part is batch[0] else part for part in batch]
        return super().lower_loss(model, hyperparameters, batch)


class Annealed(Network):
    """The loss has a factor that falls from step to step. kept: where it is kept."""

    def __init__(self, kept: str) -> None:
        super().__init__()
        self.kept = kept

    def model(self) -> nn.Module:
        model = super().model()
        if self.kept == "attribute":
            model.factor = 1.0
        else:
            model.register_buffer("factor", torch.ones(()), persistent=self.kept == "persistent buffer")
        return model

    def lower_loss(self, model: Any, hyperparameters: Hyperparameters, batch: Any) -> Tensor:
        if model.training:
            model.factor = 0.9 * model.factor
        return super().lower_loss(model, hyperparameters, batch) * model.factor


class Counted(Network):
    """A hook of the optimizer has a schedule of its own."""

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        optimizer = super().optimizer(model)
        steps = []

        def fall(*_: Any) -> None:
            steps.append(1)
            optimizer.param_groups[0]["lr"] = 0.01 * 0.5 ** len(steps)

        optimizer.register_step_post_hook(fall)
        return optimizer


class Solved(Network):
    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return exact_optimizer(model)


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        (Shuffled(), OTHER_DATA),
        (Shifted(), OTHER_CHANCE),
        (Annealed("attribute"), OTHER_STEPS),
        (Annealed("buffer"), OTHER_STEPS),
        (Annealed("persistent buffer"), None),
        (Counted(), OTHER_STEPS),
        (Network(), None),  # which has dropout and batch normalisation
        (Solved(), None),
    ],
)
def test_what_is_not_the_same_again_is_said(problem: Network, words: str | None, caplog: pytest.LogCaptureFixture):
    check_problem(problem, DECAY)
    said = [record.getMessage() for record in caplog.records]
    assert said == [] if words is None else len(said) == 1 and words in said[0]
