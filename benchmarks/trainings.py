"""Small trainings of the kinds that people run, with three hyperparameters each: what hypergradients are tried on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

from raybilevel.functional import cross_entropy
from raybilevel.problem import BilevelProblem, Hyperparameters, Level, minibatches
from raybilevel.problems.digits import CLASSES, PIXELS, digits_splits
from raybilevel.space import Parameter, Space

ROWS, COLUMNS = 8, 8
Batch = tuple[Tensor, ...]
MakeModel = Callable[[], nn.Module]
MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


@dataclass(frozen=True)
class Kind:
    """One kind of training on digits.

    annealed: the rate falls as a cosine.
    batch:    examples in a minibatch; None for all.
    """

    name: str
    model: MakeModel
    optimizer: MakeOptimizer
    epochs: int
    annealed: bool = False
    batch: int | None = 50


class Digits(BilevelProblem):
    """A classifier of digits: f is the cross-entropy with smoothed labels, plus a decay of the first tensors of weights
    and one of all others; F is the cross-entropy on other digits."""

    def __init__(self, kind: Kind, dtype: torch.dtype = torch.float32, examples: int = 200) -> None:
        self.kind, self.dtype, self.examples = kind, dtype, examples
        self.epochs = self.evaluate_every = kind.epochs

    @cached_property
    def space(self) -> Space:
        return Space(
            (
                Parameter(("decay_first",), 1e-5, 1e-1, log=True),
                Parameter(("decay_rest",), 1e-5, 1e-1, log=True),
                Parameter(("smoothing",), 0.0, 0.4),
            )
        )

    @cached_property
    def splits(self) -> dict[Level, Batch]:
        found = digits_splits(self.examples, 300, 0, self.dtype)
        return {"lower": found["lower"], "upper": found["upper"]}

    def model(self) -> nn.Module:
        return self.kind.model()

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return self.kind.optimizer(model)

    def schedule(self, optimizer: torch.optim.Optimizer) -> LRScheduler | None:
        return CosineAnnealingLR(optimizer, self.epochs) if self.kind.annealed else None

    def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Batch) -> Tensor:
        first, *rest = (weights.square().sum() for weights in model.parameters())
        penalty: Tensor = hyperparameters["decay_first"] * first
        if rest:
            penalty = penalty + hyperparameters["decay_rest"] * torch.stack(rest).sum()
        loss = cross_entropy(model(batch[0]), batch[1], label_smoothing=hyperparameters["smoothing"])
        return loss + penalty / 2

    def upper_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    def batches(self, level: Level, generator: torch.Generator | None) -> Iterator[tuple[Tensor, ...]]:
        return minibatches(self.splits[level], self.kind.batch if level == "lower" else None, generator)


class Recurrent(nn.Module):
    """An LSTM that reads an image row by row."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.recurrent, self.head = nn.LSTM(COLUMNS, width, batch_first=True), nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        states, _ = self.recurrent(images.view(-1, ROWS, COLUMNS))
        logits: Tensor = self.head(states[:, -1])
        return logits


class Attention(nn.Module):
    """A transformer of one layer, whose tokens are the rows of an image."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Linear(COLUMNS, width)
        self.place = nn.Parameter(0.1 * torch.randn(ROWS, width))
        self.layer = nn.TransformerEncoderLayer(width, 2, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.embedding(images.view(-1, ROWS, COLUMNS)) + self.place
        logits: Tensor = self.head(self.layer(tokens).mean(1))
        return logits


def network(*between: nn.Module, hidden: int = 32) -> nn.Module:
    """One hidden layer, with these modules before its tanh."""
    return nn.Sequential(nn.Linear(PIXELS, hidden), *between, nn.Tanh(), nn.Linear(hidden, CLASSES))


def perceptron() -> nn.Module:
    """The network of `problems.digits`."""
    return nn.Sequential(nn.Linear(PIXELS, 48), nn.Tanh(), nn.Linear(48, 24), nn.Tanh(), nn.Linear(24, CLASSES))


def sgd(rate: float, momentum: float = 0.0) -> MakeOptimizer:
    return lambda model: torch.optim.SGD(model.parameters(), lr=rate, momentum=momentum)


def adam(rate: float) -> MakeOptimizer:
    return lambda model: torch.optim.Adam(model.parameters(), lr=rate)


def lbfgs(model: nn.Module) -> torch.optim.Optimizer:
    """With it, one epoch is a training to the minimiser."""
    return torch.optim.LBFGS(
        model.parameters(), max_iter=300, history_size=20, tolerance_grad=1e-7, line_search_fn="strong_wolfe"
    )


KINDS = (
    Kind("tanh, SGD without momentum, 300 epochs", network, sgd(0.1), 300),
    Kind("cosine schedule, momentum, 50", network, sgd(0.05, 0.9), 50, annealed=True),
    Kind("dropout, 50", lambda: network(nn.Dropout(0.3)), sgd(0.05, 0.9), 50),
    Kind("Adam, 50", network, adam(3e-3), 50),
    Kind("BatchNorm, 50", lambda: network(nn.BatchNorm1d(32)), sgd(0.05, 0.9), 50),
    Kind("perceptron, 60", perceptron, sgd(0.1, 0.9), 60),
    Kind("perceptron, 300", perceptron, sgd(0.1, 0.9), 300),
    Kind("LSTM, Adam, cosine, 60", Recurrent, adam(5e-3), 60, annealed=True),
    Kind("attention, Adam, cosine, 60", Attention, adam(2e-3), 60, annealed=True),
    Kind("logistic, L-BFGS", lambda: nn.Linear(PIXELS, CLASSES), lbfgs, 1, batch=None),
)


def problem_of(kind: Kind, dtype: torch.dtype = torch.float32, epochs: int | None = None) -> Digits:
    """The problem of a kind, for another number of epochs if given."""
    return Digits(kind if epochs is None else replace(kind, epochs=epochs), dtype)
