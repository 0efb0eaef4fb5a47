"""A level that is another function at each call is refused before anything is trained."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader, TensorDataset

from raybilevel.errors import ProblemError
from raybilevel.problem import Hyperparameters, Level, minibatches
from raybilevel.search import check_problem
from raybilevel.space import Parameter, Space
from tests.problems_for_tests import Network

DECAY = Space((Parameter(("decay",), 1e-4, 1.0, log=True),))


class Noisy(Network):
    """Inputs are changed by chance before the loss of one level. where: "lower" or "upper"."""

    def __init__(self, where: Level, change: Any) -> None:
        super().__init__()
        self.where, self.change = where, change

    def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Any) -> Tensor:
        if self.where == "lower":
            batch = self.change(model, batch[0]), batch[1]
        penalty = sum(parameter.square().sum() for parameter in model.parameters())
        return F.cross_entropy(model(batch[0]), batch[1]) + hyperparameters["decay"] * penalty

    def upper_loss(self, model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(self.change(model, batch[0]) if self.where == "upper" else batch[0]), batch[1])


@pytest.mark.parametrize("level", ["lower", "upper"])
@pytest.mark.parametrize(
    "change",
    [
        lambda model, x: F.dropout(x, 0.2),
        lambda model, x: x + 1e-3 * torch.randn_like(x),
        lambda model, x: torch.lerp(x, x[torch.randperm(len(x))], 0.3),
    ],
)
def test_a_loss_that_draws_in_eval_mode_is_refused(level: Level, change: Any):
    with pytest.raises(ProblemError, match=rf"Noisy\.{level}_loss is not the same twice.*training=model\.training"):
        check_problem(Noisy(level, change), DECAY)


@pytest.mark.parametrize(
    "change",
    [
        lambda model, x: F.dropout(x, 0.2, training=model.training),
        lambda model, x: x + torch.randn(x.shape, generator=torch.Generator().manual_seed(0)),
    ],
)
def test_chance_in_train_mode_and_fixed_draws_are_sound(change: Any):
    check_problem(Noisy("lower", change), DECAY)


def test_a_noise_level_as_a_hyperparameter_is_refused():
    class Level(Network):
        def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Any) -> Tensor:
            noise = hyperparameters["decay"] * torch.randn_like(batch[0])
            return F.cross_entropy(model(batch[0] + noise), batch[1])

    with pytest.raises(ProblemError, match="seeded anew at each call"):
        check_problem(Level(), DECAY)


class Loaded(Network):
    """kind: how the data come where there is no generator."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def batches(self, level: Level, generator: torch.Generator | None) -> Iterable[Any]:
        data = TensorDataset(self.x, self.y)
        if self.kind == "fixed":
            return DataLoader(data, 8, shuffle=generator is not None, generator=generator)
        if self.kind == "augmented":
            return [(self.x + torch.randn_like(self.x), self.y)]
        if self.kind == "subset":
            return [(self.x, self.y), (self.x[torch.randperm(9)], self.y[:9])]
        if self.kind == "longer":
            return [(self.x, self.y)] * int(1 + torch.randint(1000, ()))
        return DataLoader(data, 8, shuffle=True, drop_last=self.kind == "drop_last")


def test_a_loader_in_a_fixed_order_is_sound():
    check_problem(Loaded("fixed"), DECAY)


@pytest.mark.parametrize("kind", ["shuffled", "drop_last", "augmented", "subset", "longer"])
def test_data_that_differ_from_pass_to_pass_are_refused(kind: str):
    with pytest.raises(ProblemError, match=r"batches\('lower', None\) yields other data.*shuffle=generator is not"):
        check_problem(Loaded(kind), DECAY)


def test_an_iterator_that_is_used_up_is_named():
    class Once(Network):
        def __init__(self) -> None:
            super().__init__()
            self.iterator = iter([(self.x, self.y)])

        def batches(self, level: Level, generator: torch.Generator | None) -> Iterator[Any]:
            return self.iterator

    with pytest.raises(ProblemError, match="is it an iterator that was used up"):
        check_problem(Once(), DECAY)


def test_levels_by_other_names_are_named():
    class Named(Network):
        def batches(self, level: Any, generator: torch.Generator | None) -> Iterable[Any]:
            rows = slice(0, 12) if level == "train" else slice(12, 23)
            return minibatches((self.x[rows], self.y[rows]), None, generator)

    with pytest.raises(ProblemError, match=r"compares its level with 'train'; the levels are 'lower'"):
        check_problem(Named(), DECAY)

    class Dictionary(Named):
        def batches(self, level: Any, generator: torch.Generator | None) -> Iterable[Any]:
            return [{"train": (self.x, self.y), "valid": (self.x, self.y)}[level]]

    with pytest.raises(ProblemError, match=r"Dictionary\.batches\('lower', None\) raised KeyError: 'lower'"):
        check_problem(Dictionary(), DECAY)
