"""The common part of classification problems: splits, minibatches, cross-entropy, test metrics, decay of layers."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from raybilevel.errors import ConfigError
from raybilevel.problem import BilevelProblem, Hyperparameters, Level, minibatches

Examples = tuple[Tensor, Tensor]
Share = Literal["all", "layer"]
PenaltyScale = Literal["paper", "batch"]

TEST_CHUNK = 1000


class Minibatch(NamedTuple):
    """Inputs x and class numbers y of some examples, and the number of `examples` in the whole pass.

    A regulariser that is divided by the number of training examples needs that number, which differs in a refit.
    """

    x: Tensor
    y: Tensor
    examples: int


class SplitData(BilevelProblem):
    """Classification data in splits, which are read once. Subclasses define the data, the model and both levels.

    batch: examples in a minibatch; None for all at once.
    """

    batch: int | None = None
    _is_half = False

    @abstractmethod
    def load(self) -> dict[str, Examples]:
        """Inputs and class numbers of the splits "lower" (training), "upper" (validation) and, if any, "test"."""

    @cached_property
    def splits(self) -> dict[str, Examples]:
        """The splits of `load`, and "refit": training and validation data together."""
        splits = self.load()
        return {**splits, "refit": joined(splits["lower"], splits["upper"])}

    def halves(self) -> list[Self]:
        """The problem twice, with one half of the validation examples for training and the other half for F."""
        one, other = halved(self.splits["upper"])
        found = []
        for trained_on, held_out in ((one, other), (other, one)):
            half = copy.copy(self)
            half.splits = {**self.splits, "lower": joined(self.splits["lower"], trained_on), "upper": held_out}
            half.patience, half._is_half = None, True
            found.append(half)
        return found

    def __getstate__(self) -> dict[str, Any]:
        """The state without the data: little is sent to a worker, which reads the data itself. Those of a half stay."""
        return {name: value for name, value in self.__dict__.items() if name != "splits" or self._is_half}

    def batches(self, level: Level, generator: torch.Generator | None) -> Iterator[Minibatch]:
        return self._minibatches(level, generator)

    def refit_batches(self, generator: torch.Generator | None) -> Iterator[Minibatch]:
        return self._minibatches("refit", generator)

    def _minibatches(self, split: str, generator: torch.Generator | None) -> Iterator[Minibatch]:
        examples = self.splits[split]
        for x, y in minibatches(examples, self.batch, generator):
            yield Minibatch(x, y, len(examples[0]))

    def test_metrics(self, model: nn.Module) -> dict[str, float]:
        """Loss and accuracy on the test split; empty if there is none."""
        if "test" not in self.splits:
            return {}
        losses, correct = self._on_test(model)
        return {"test_loss": losses.mean().item(), "test_accuracy": correct.double().mean().item()}

    def test_losses(self, model: nn.Module) -> Tensor | None:
        return self._on_test(model)[0] if "test" in self.splits else None

    def _on_test(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        """The cross-entropy of each test example, and whether its class is right, both of shape (n,), on the CPU."""
        losses, correct = [], []
        for x, y in minibatches(
            self.splits["test"], TEST_CHUNK, None
        ):  # chunks, so that activations take little memory
            logits, y = model(x.to(self.device, self.dtype)), y.to(self.device)
            losses.append(cross_entropy(logits, y, reduction="none").cpu())
            correct.append((logits.argmax(1) == y).cpu())
        return torch.cat(losses).double(), torch.cat(correct)


class Classification(SplitData):
    """F is the cross-entropy on validation data. Subclasses define the data, the model and f."""

    def upper_loss(self, model: nn.Module, batch: Minibatch) -> Tensor:
        return cross_entropy(model(batch.x), batch.y)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Loss and accuracy on the test split."""
        return self.test_metrics(model)


class LayerDecay(Classification):
    """Weight decay of the linear and convolutional layers l of a network, weights W_l without biases:

        f = cross-entropy + sum_l weight_decay_l |W_l|^2 / (4 n)

    n is the number of training examples, as in Sinha, Gunwal & Kumar, arXiv:2208.12118, where weight_decay_l is
    exp(x_l). The network is trained by SGD with Nesterov momentum.

    share:         "layer": weight_decay has one entry per layer, by its name. "all": it is one number for all layers.
    penalty_scale: "paper": n as above. "batch": n is the size of the current batch, as in the authors' code.
    """

    def __init__(
        self,
        *,
        batch: int | None,
        epochs: int,
        learning_rate: float,
        momentum: float,
        share: Share = "layer",
        penalty_scale: PenaltyScale = "paper",
    ) -> None:
        check_positive(batch=1 if batch is None else batch, epochs=epochs, learning_rate=learning_rate)
        if not 0 <= momentum < 1:
            raise ConfigError(f"momentum must be from 0 to below 1, got {momentum}")
        _check_choice("share", share, get_args(Share))
        _check_choice("penalty_scale", penalty_scale, get_args(PenaltyScale))
        self.batch, self.epochs, self.learning_rate, self.momentum = batch, epochs, learning_rate, momentum
        self.share, self.penalty_scale = share, penalty_scale

    def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Minibatch) -> Tensor:
        weights = {
            name: layer.weight for name, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)
        }
        decay = self._decay(hyperparameters, list(weights))
        penalty = torch.stack([decay[name] * weight.square().sum() for name, weight in weights.items()]).sum()
        n = batch.examples if self.penalty_scale == "paper" else len(batch.x)
        return cross_entropy(model(batch.x), batch.y) + penalty / (4 * n)

    def _decay(self, hyperparameters: Hyperparameters, layers: list[str]) -> Mapping[str, Any]:
        decay = hyperparameters.get("weight_decay")
        if self.share == "all":
            if decay is None or isinstance(decay, Mapping):
                raise ConfigError(f"with share='all', weight_decay must be one number, got {decay!r}")
            return dict.fromkeys(layers, decay)
        if not isinstance(decay, Mapping) or set(decay) != set(layers):
            found = ", ".join(map(str, decay)) if isinstance(decay, Mapping) else repr(decay)
            raise ConfigError(f"weight_decay must have exactly the entries {', '.join(layers)}, got {found}")
        return decay

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        # torch refuses Nesterov's form with a momentum of 0, for which it is the same as the plain one.
        return torch.optim.SGD(
            model.parameters(), lr=self.learning_rate, momentum=self.momentum, nesterov=self.momentum > 0
        )


def joined(one: Examples, other: Examples) -> Examples:
    return torch.cat([one[0], other[0]]), torch.cat([one[1], other[1]])


def halved(examples: Examples) -> tuple[Examples, Examples]:
    """Two halves with as many examples of each class, but for one."""
    x, y = examples
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    by_class = order[torch.argsort(y[order], stable=True)]
    one, other = by_class[::2], by_class[1::2]
    return (x[one], y[one]), (x[other], y[other])


def data_folder(problem: BilevelProblem, data: str | None) -> str:
    """The absolute folder of a problem's data files; see `_datasets`. A worker runs in another directory.

    Raises:
        ConfigError: it was not given.
    """
    if data is None:
        raise ConfigError(f"{type(problem).__name__} reads data files: give their folder with --data (option data)")
    return str(Path(data).expanduser().absolute())


def check_positive(**settings: float) -> None:
    for name, value in settings.items():
        if not value > 0:
            raise ConfigError(f"{name} must be positive, got {value}")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"unknown {name} {value!r}; choose one of {', '.join(choices)}")
