"""A training of some framework as a bilevel problem and a Tune trainable in one."""

from __future__ import annotations

import weakref
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import ray
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from raybilevel._adapters.clock import Clock
from raybilevel._adapters.decays import Decay, decays_of, penalty
from raybilevel._adapters.functions import TakesTensors
from raybilevel._adapters.marks import Held, Place, in_place, marked, paths_of, places_in, plain
from raybilevel._adapters.slopes import check_slopes
from raybilevel._dependent import seeded
from raybilevel._tree import look_up
from raybilevel.problem import Batch, BilevelProblem, Hyperparameters
from raybilevel.tune import conclude

PLACES, DECAYS = "_raybilevel_places", "_raybilevel_decays"
"""The attributes of a model that keep them."""


@dataclass(frozen=True)
class Trained:
    """The end of a training.

    passes:  over the training data, with gradients.
    metrics: to be reported beside F.
    share:   of the training after which the weights were kept.
    """

    model: nn.Module
    passes: float
    metrics: Mapping[str, Any] = field(default_factory=dict)
    share: float = 1.0


_checked: weakref.WeakSet[Adapter] = weakref.WeakSet()
"""Problems whose gradients were compared with differences in this process."""
_made: weakref.WeakKeyDictionary[Adapter, tuple[dict[str, Any], Any]] = weakref.WeakKeyDictionary()
"""What each last made of a config, beside its model."""


class Adapter(BilevelProblem):
    """A problem and its trainable. Call it with a config to train, as Tune does.

    A model is made of marked configs, so that the hyperparameters are found where it keeps them. While the training
    loss is computed they are tensors.

    by_values: names of hyperparameters that are left as numbers in the loss.
    """

    own_loop = True
    made_by: ClassVar[str]
    """The function that makes it, for messages."""

    def __init__(self, metric: str, by_values: Collection[str], device: str | torch.device) -> None:
        self.upper_metric, self.by_values, self.device = metric, tuple(by_values), device
        # What Tune calls the trainable.
        self.__name__ = self.made_by

    @abstractmethod
    def marked_model(self, config: Mapping[str, Any]) -> nn.Module:
        """A model of a config with marks."""

    @abstractmethod
    def roots(self, model: nn.Module) -> Collection[Any]:
        """Where hyperparameters may be kept."""

    @abstractmethod
    def training_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Batch) -> Tensor:
        """The framework's own training loss, without what the optimizer adds."""

    @abstractmethod
    def validation_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Batch) -> Tensor:
        """F on a batch."""

    def keep_decays(self, model: nn.Module, optimizers: Iterable[Optimizer]) -> None:
        """Of the optimizers of a model, before its weights are replaced by others, which no optimizer takes."""
        vars(model)[DECAYS] = Held(decays_of(optimizers, model))

    def decays(self, model: nn.Module) -> tuple[Decay, ...]:
        """What the optimizer adds."""
        kept: Held | None = vars(model).get(DECAYS)
        return () if kept is None else kept.value

    @abstractmethod
    def train_model(self, config: Mapping[str, Any]) -> Trained:
        """Train by the framework's own loop."""

    def model(self, hyperparameters: Mapping[str, Any]) -> nn.Module:
        # Frameworks seed the random numbers of the whole process.
        with seeded("model"):
            return self.marked_model(marked(hyperparameters, self.by_values))

    def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Batch) -> Tensor:
        # In the driver, where the search is made. Its workers have the same problem.
        if self not in _checked and not in_a_worker():
            _checked.add(self)
            check_slopes(self.made_by, self.model, self.loss, hyperparameters, batch)
        return self.loss(model, hyperparameters, batch)

    def loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Batch) -> Tensor:
        """The training loss with what the optimizer adds, at tensors for hyperparameters."""
        with self.tensors(model, hyperparameters):
            loss = self.training_loss(model, hyperparameters, batch)
        return loss + penalty(self.decays(model), model, hyperparameters)

    def upper_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Batch) -> Tensor:
        with self.tensors(model, hyperparameters):
            return self.validation_loss(model, hyperparameters, batch)

    @contextmanager
    def tensors(self, model: nn.Module, hyperparameters: Hyperparameters) -> Iterator[None]:
        """Within it hyperparameters are tensors wherever the model has them."""
        given = [look_up(hyperparameters, path) for path in paths_of(hyperparameters)]
        with in_place(self.places(model), hyperparameters) as placed, TakesTensors([*given, *placed]):
            yield

    def places(self, model: nn.Module) -> Sequence[Place]:
        """Where hyperparameters are kept, looked up once for a model."""
        if PLACES not in vars(model):
            vars(model)[PLACES] = Held(places_in(self.roots(model)))
        found: Sequence[Place] = vars(model)[PLACES].value
        return found

    def once(self, config: Mapping[str, Any], make: Callable[[Mapping[str, Any]], Any]) -> Any:
        """What is made of a config, kept until it is asked for of another one: data need not be read for each pass."""
        known = _made.get(self)
        if known is None or known[0] != config:
            with seeded("data"):
                known = _made[self] = (plain(config), make(config))
        return known[1]

    def __call__(self, config: dict[str, Any]) -> None:
        """Train with the config of a Tune trial, and conclude."""
        with Clock() as clock:
            trained = self.train_model(config)
        conclude(
            self, trained.model, config, passes=trained.passes, metrics=trained.metrics,
            trained_time=clock.time(trained.model, trained.share),
        )  # fmt: skip


def in_a_worker() -> bool:
    """Whether this process is an actor of Ray, as trials and upper-level steps are."""
    return ray.is_initialized() and ray.get_runtime_context().get_actor_id() is not None
