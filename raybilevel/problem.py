"""The bilevel problem, as a user writes it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

Level = Literal["lower", "upper"]
Batch = Any
Hyperparameters = Mapping[str, Any]


class BilevelProblem(ABC):
    """Choose hyperparameters x so that the weights y trained with them do well on other data.

        min_{x, y} F(x, y)   subject to   y in argmin_y' f(x, y')

    F, the upper level, is the mean of `upper_loss` over the upper batches (validation data); f, the lower
    level, is the mean of `lower_loss` over the lower batches (training data), regularisers included. Means
    are weighted by `batch_size`. During a training the model is in `train()` mode; F, f and their gradients
    are taken in `eval()` mode, in which a module of `upper_variables` always is. Trainings in one process share the
    problem, which reaches each process once: keep nothing of a training in it.

    epochs: passes over the lower batches in one training.
    device, dtype: where and in which precision a training runs; batches are moved and cast to them.
    optimistic: where many y minimise f, take the one with the lowest F, as the problem above says, and not the one that
        the training happens to reach. Each training then goes on from there, at up to twice the cost, and its weights
        have seen the upper level's data: judge them by other data.
    """

    epochs: int = 50
    device: str | torch.device = "cpu"
    dtype: torch.dtype = torch.float32
    optimistic: bool = False

    @abstractmethod
    def model(self) -> nn.Module:
        """A fresh model; its parameters are the lower-level variable y. Called under a fixed seed."""

    @abstractmethod
    def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Batch) -> Tensor:
        """f on one batch, shape (). Floats in the trial's config arrive as 0-dimensional tensors under their
        names, nested as the space is; differentiable in them and in the model's parameters."""

    @abstractmethod
    def upper_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """F on one batch, shape ()."""

    @abstractmethod
    def batches(self, level: Level, generator: torch.Generator | None) -> Iterable[Batch]:
        """One pass over a level's data, shuffled by the generator where there is one, else in a fixed order."""

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """What trains y. Any torch optimizer; it is stepped with a closure, so L-BFGS works too."""
        return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Further metrics of a trained model, e.g. {"test_loss": ...}; reported with every epoch."""
        return {}

    # For upper levels too large for a search space (method "hypergradient").

    def upper_variables(self) -> nn.Module | None:
        """A fresh module whose parameters are the upper-level variable x: filters, edges, a network that weights
        examples. The losses find it as hyperparameters["upper"]. None: x is what the search space names. Called under
        a fixed seed, another one for each start."""
        return None

    def lower_map(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Batch) -> Tensor:
        """g at the model's parameters y, where the lower level is a fixed point y = g(x, y), an equilibrium, and not a
        minimum (method "hypergradient" with lower "fixed_point"): shape (rows, n / rows), the parameters in their
        order; rows are independent of each other, e.g. examples. `lower_loss` is then some measure of y - g(x, y)."""
        raise NotImplementedError(f"{type(self).__name__} has no lower_map")

    def upper_loss_at(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Batch) -> Tensor:
        """F on one batch where it depends on x itself, and not through the weights only."""
        return self.upper_loss(model, batch)

    def evaluate_at(self, model: nn.Module, hyperparameters: Hyperparameters) -> dict[str, float]:
        """`evaluate` where it depends on x itself."""
        return self.evaluate(model)

    def selection_loss_at(self, model: nn.Module, hyperparameters: Hyperparameters) -> float | None:
        """What chooses among the x on the way of a descent, the lowest: a loss on data that neither level sees, where x
        has variables enough to fit the upper level's. None: F."""
        return None

    def shard(self, index: int, count: int) -> BilevelProblem:
        """This problem on part `index` of `count` parts of its data, for descents that see a part each (setting
        `shards`). The upper-level variables are the same; the lower level's may be others, e.g. fewer images."""
        raise NotImplementedError(f"{type(self).__name__} has no shard")

    def refit_batches(self, generator: torch.Generator | None) -> Iterable[Batch] | None:
        """One pass over training plus validation data, for the final refit; None where a refit makes no sense."""
        return None

    def batch_size(self, batch: Batch) -> int:
        """Examples in a batch: the length of its first tensor."""
        for leaf in leaves(batch):
            return len(leaf) if leaf.dim() else 1
        return 1


def leaves(batch: Batch) -> Iterator[Tensor]:
    """The tensors of a batch made of tuples, lists and dicts, in order."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from leaves(value)
    elif isinstance(batch, tuple | list):
        for value in batch:
            yield from leaves(value)


def move(batch: Batch, device: str | torch.device, dtype: torch.dtype) -> Batch:
    """The batch on a device, its floating-point tensors in a precision."""
    if isinstance(batch, Tensor):
        return batch.to(device, dtype) if batch.is_floating_point() else batch.to(device)
    if isinstance(batch, Mapping):
        return {key: move(value, device, dtype) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(move(value, device, dtype) for value in batch))
    if isinstance(batch, tuple | list):
        return type(batch)(move(value, device, dtype) for value in batch)
    return batch


def minibatches(
    tensors: tuple[Tensor, ...], size: int | None, generator: torch.Generator | None
) -> Iterator[tuple[Tensor, ...]]:
    """Batches of `size` rows (None: all rows at once) of tensors of equal length, shuffled by the generator."""
    rows = len(tensors[0])
    if size is None or size >= rows:
        yield tensors
        return
    order = torch.arange(rows) if generator is None else torch.randperm(rows, generator=generator)
    for chosen in order.split(size):
        yield tuple(tensor[chosen] for tensor in tensors)
