"""A level that is another function at each call is refused before anything is trained."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, TensorDataset

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


@pytest.mark.parametrize(
    ("source", "seed", "number"), [(random.random, random.seed, 2), (np.random.rand, np.random.seed, 3)]
)
def test_chance_that_strikes_seldom_is_found_by_what_it_draws(source: Any, seed: Any, number: int):
    """Under these seeds the first two evaluations agree."""

    def seldom(model: nn.Module, x: Tensor) -> Tensor:
        return x.flip(0) if source() < 0.15 else x

    seed(number)
    with pytest.raises(ProblemError, match=r"Noisy\.lower_loss is not the same twice"):
        check_problem(Noisy("lower", seldom), DECAY)


@pytest.mark.parametrize(
    "generator",
    [torch.Generator().manual_seed(0), np.random.default_rng(0), np.random.RandomState(0), random.Random(0)],
)
def test_chance_of_a_generator_that_is_kept_is_found_by_what_it_draws(generator: Any):
    """It strikes at the fifth evaluation."""
    calls = []

    def seldom(model: nn.Module, x: Tensor) -> Tensor:
        calls.append(torch.rand((), generator=generator) if isinstance(generator, torch.Generator) else draw())
        return x.flip(0) if len(calls) == 5 else x

    def draw() -> Any:
        return (generator.random if hasattr(generator, "random") else generator.rand)()

    for owner in ("problem", "model"):
        calls.clear()
        problem = Noisy("lower", seldom)
        if owner == "problem":
            problem.generator = generator  # type: ignore[attr-defined]
        else:
            problem.model = lambda: with_generator(generator)  # type: ignore[method-assign]
        with pytest.raises(ProblemError, match=r"Noisy\.lower_loss is not the same twice"):
            check_problem(problem, DECAY)


def with_generator(generator: Any) -> nn.Module:
    model = Network().model()
    model.generator = generator
    return model


class NoiseLevel(Network):
    def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Any) -> Tensor:
        noise = hyperparameters["decay"] * torch.randn_like(batch[0])
        return F.cross_entropy(model(batch[0] + noise), batch[1])


def test_a_noise_level_as_a_hyperparameter_is_taken_and_said(caplog: pytest.LogCaptureFixture):
    assert check_problem(NoiseLevel(), DECAY).smooth == (True,)
    assert "f is taken as its mean over some draws" in caplog.text


def test_a_sum_over_examples_is_said_where_batches_differ_in_size(caplog: pytest.LogCaptureFixture):
    class Summed(Network):
        size = 8

        def batches(self, level: Level, generator: torch.Generator | None) -> Iterable[Any]:
            if level == "lower":
                return super().batches(level, generator)
            return minibatches((self.x[1:], self.y[1:]), self.size, generator)

        def upper_loss(self, model: nn.Module, batch: Any) -> Tensor:
            return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")

    check_problem(Summed(), DECAY)
    assert "Summed.upper_loss of a batch twice over is twice as large, a sum over examples" in caplog.text
    caplog.clear()
    even = Summed()
    even.size = 11
    check_problem(even, DECAY)
    check_problem(Network(), DECAY)
    assert not caplog.records


def test_a_loss_that_puts_the_model_in_train_mode_is_refused():
    with pytest.raises(ProblemError, match=r"Noisy\.lower_loss changes the model \(train mode\)"):
        check_problem(Noisy("lower", lambda model, x: model.train() and x), DECAY)


class Loaded(Network):
    """kind: how the data come where there is no generator."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def batches(self, level: Level, generator: torch.Generator | None) -> Iterable[Any]:
        data = TensorDataset(self.x, self.y)
        if self.kind == "fixed":
            return DataLoader(data, 8, shuffle=generator is not None, generator=generator)
        if self.kind == "middle":
            parts = list(minibatches((self.x, self.y), 8, None))
            return [parts[0], (parts[1][0] + torch.randn(8, 4), parts[1][1]), parts[2]]
        if self.kind == "incomplete":
            return DataLoader(data, 8, drop_last=True)
        if self.kind == "incomplete sampler":
            return DataLoader(data, batch_sampler=BatchSampler(SequentialSampler(data), 8, drop_last=True))
        if self.kind == "augmented":
            return [(self.x + torch.randn_like(self.x), self.y)]
        if self.kind == "subset":
            return [(self.x, self.y), (self.x[torch.randperm(9)], self.y[:9])]
        if self.kind == "longer":
            return [(self.x, self.y)] * int(1 + torch.randint(1000, ()))
        return DataLoader(data, 8, shuffle=True, drop_last=self.kind == "drop_last")


def test_a_loader_in_a_fixed_order_is_sound():
    check_problem(Loaded("fixed"), DECAY)


@pytest.mark.parametrize("kind", ["shuffled", "drop_last", "augmented", "middle", "subset", "longer"])
def test_data_that_differ_from_pass_to_pass_are_refused(kind: str):
    with pytest.raises(ProblemError, match=r"batches\('lower', None\) yields other data.*shuffle=generator is not"):
        check_problem(Loaded(kind), DECAY)


@pytest.mark.parametrize("kind", ["incomplete", "incomplete sampler"])
def test_examples_that_a_loader_drops_are_said(kind: str, caplog: pytest.LogCaptureFixture):
    check_problem(Loaded(kind), DECAY)
    assert "Loaded.batches('lower', None): drop_last leaves out 7 of 23 examples" in caplog.text


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


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (KeyError("lower"), "raised KeyError: 'lower'; the levels are 'lower', the training data"),
        (ValueError("no such level"), "raised ValueError: no such level; it compares its level with 'train'; the"),
    ],
)
def test_a_level_by_another_name_explains_what_batches_raises(error: Exception, message: str):
    class Strict(Network):
        def batches(self, level: Any, generator: torch.Generator | None) -> Iterable[Any]:
            if isinstance(error, ValueError) and level == "train":
                return []
            raise error

    with pytest.raises(ProblemError, match=message):
        check_problem(Strict(), DECAY)


def test_the_same_data_at_both_levels_are_said(caplog: pytest.LogCaptureFixture):
    """A look-up with a default compares nothing."""

    class Defaulted(Network):
        def batches(self, level: Any, generator: torch.Generator | None) -> Iterable[Any]:
            rows = {"train": slice(0, 12)}.get(level, slice(12, 23))
            return minibatches((self.x[rows], self.y[rows]), None, generator)

    check_problem(Defaulted(), DECAY)
    assert "Defaulted.batches yields the same data for both levels, so that F is a training loss" in caplog.text
    caplog.clear()
    check_problem(Network(), DECAY)
    assert not caplog.records


@pytest.mark.parametrize("place", ["problem", "model"])
def test_an_upper_loss_that_reads_what_the_lower_one_has_left_is_refused(place: str):
    class Left(Network):
        decay: Any = 0.0

        def lower_loss(self, model: Any, hyperparameters: Hyperparameters, batch: Any) -> Tensor:
            (self if place == "problem" else model).decay = hyperparameters["decay"]
            return super().lower_loss(model, hyperparameters, batch)

        def upper_loss(self, model: Any, batch: Any) -> Tensor:
            left = getattr(self if place == "problem" else model, "decay", 0.0)
            return super().upper_loss(model, batch) + torch.as_tensor(left).detach()

    with pytest.raises(ProblemError, match=r"Left\.upper_loss follows what lower_loss was last evaluated at.*argument"):
        check_problem(Left(), DECAY)


def test_a_lower_loss_that_is_not_finite_elsewhere_is_no_reason_to_refuse():
    class AtTheCentre(Network):
        def lower_loss(self, model: Any, hyperparameters: Hyperparameters, batch: Any) -> Tensor:
            elsewhere = (hyperparameters["decay"] - 0.01).abs() > 1e-6
            return super().lower_loss(model, hyperparameters, batch) + (torch.nan if elsewhere else 0.0)

    check_problem(AtTheCentre(), DECAY)


def test_a_loss_that_changes_the_hyperparameters_that_it_is_given_is_explained():
    class Doubles(Network):
        def lower_loss(self, model: Any, hyperparameters: Any, batch: Any) -> Tensor:
            hyperparameters["decay"] = 2 * hyperparameters["decay"]
            return super().lower_loss(model, hyperparameters, batch)

    with pytest.raises(ProblemError, match=r"a second time.*leave the hyperparameters as they are given"):
        check_problem(Doubles(), DECAY)


class Elsewhere(Network):
    """Both levels yield the same batch. what: it is; of_level: the data of a level's loss."""

    def __init__(self, what: Any, of_level: Any) -> None:
        super().__init__()
        self.what, self.of_level = what, of_level

    def loss(self, model: nn.Module, batch: Any, lower: bool) -> Tensor:
        return F.cross_entropy(*self.of_level(self, model, batch, lower))

    def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Any) -> Tensor:
        penalty = sum(parameter.square().sum() for parameter in model.parameters())
        return self.loss(model, batch, True) + hyperparameters["decay"] * penalty

    def upper_loss(self, model: nn.Module, batch: Any) -> Tensor:
        return self.loss(model, batch, False)

    def batches(self, level: Level, generator: torch.Generator | None) -> Iterable[Any]:
        return [self.what(self)]


def half(lower: bool) -> slice:
    return slice(0, 12) if lower else slice(12, 23)


@pytest.mark.parametrize(
    ("what", "of_level", "warned"),
    [
        (lambda p: (p.x, p.y), lambda p, model, b, lower: (model(b[0]), b[1]), True),
        (lambda p: (p.x, p.y), lambda p, model, b, lower: (model(b[0])[half(lower)], b[1][half(lower)]), False),
        (lambda p: torch.zeros(4), lambda p, model, b, lower: (model(p.x[half(lower)]), p.y[half(lower)]), False),
        (
            lambda p: torch.arange(11),
            lambda p, model, b, lower: (model(p.x[half(lower)][b]), p.y[half(lower)][b]),
            False,
        ),
        (
            lambda p: {"x": p.x, "y": p.y, "train": torch.arange(23) < 12},
            lambda p, model, b, lower: (model(b["x"])[b["train"] == lower], b["y"][b["train"] == lower]),
            False,
        ),
        (lambda p: torch.zeros(4, 1), lambda p, model, b, lower: (model(p.x[half(lower)]), p.y[half(lower)]), False),
    ],
    ids=["given", "masks", "constant", "index", "masks_in_batch", "constant_matrix"],
)
def test_the_same_batch_at_both_levels_is_said_only_where_it_has_the_data(
    what: Any, of_level: Any, warned: bool, caplog: pytest.LogCaptureFixture
):
    check_problem(Elsewhere(what, of_level), DECAY)
    assert ("yields the same data for both levels" in caplog.text) is warned


def test_a_level_by_a_prefix_of_another_name_is_named():
    class Prefixed(Network):
        def batches(self, level: Any, generator: torch.Generator | None) -> Iterable[Any]:
            rows = slice(0, 12) if level.startswith(("tr", "fit")) else slice(12, 23)
            return minibatches((self.x[rows], self.y[rows]), None, generator)

    with pytest.raises(ProblemError, match="compares its level with 'fit', 'tr'; the levels are"):
        check_problem(Prefixed(), DECAY)
