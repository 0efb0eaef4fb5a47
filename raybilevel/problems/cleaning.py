"""Data hyper-cleaning: a weight for each group of training images, with more wrong labels in each group."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from raybilevel.errors import ConfigError
from raybilevel.problem import Hyperparameters
from raybilevel.problems import _datasets as datasets
from raybilevel.problems._classification import Examples, Minibatch, check_positive, data_folder
from raybilevel.problems._logistic import Logistic, pooled
from raybilevel.problems.digits import EXAMPLES, PIXELS, digits_splits
from raybilevel.space import Parameter, Space


class GroupedBatch(NamedTuple):
    """Inputs, class numbers, and the group of each example. The last group is clean and has weight 1."""

    x: Tensor
    y: Tensor
    group: Tensor
    examples: int


class Cleaning(Logistic):
    """Digits with wrong labels: a weight in [0, 1] for each group of training images. Subclasses say which digits.

    f = mean_i weight_g(i) * cross-entropy_i + decay |W|^2 / 2, with the weight of the group g of image i.

    The share of wrong labels rises from 0 in the first group to `wrong` in the last. F is the cross-entropy on clean
    validation images. A refit includes them with weight 1.

    images: how many there are for training and validation.
    """

    images: int

    def __init__(self, train: int, validation: int, groups: int, wrong: float, decay: float, split_seed: int) -> None:
        check_positive(train=train, validation=validation, groups=groups, decay=decay)
        if train + validation > self.images or groups > train:
            raise ConfigError(
                f"there are {self.images:,} images for train and validation, and a group needs at least one; "
                f"got {train} + {validation} in {groups} groups"
            )
        if not 0 <= wrong <= 1:
            raise ConfigError(f"wrong is a share, from 0 to 1, got {wrong}")
        self.train, self.validation, self.groups, self.wrong = train, validation, groups, wrong
        self.decay, self.split_seed = decay, split_seed

    @abstractmethod
    def digits(self) -> tuple[Examples, Examples]:
        """Images, (n, ...), and labels, (n,), for training and validation, and those of the test."""

    @abstractmethod
    def inputs(self, images: Tensor) -> Tensor:
        """Of the model, (n, features), for images (n, ...)."""

    @property
    def space(self) -> Space:
        return Space(tuple(Parameter(("weight", f"g{g}"), 0.0, 1.0) for g in range(self.groups)))

    @property
    def group(self) -> Tensor:
        """The group of each training image."""
        return torch.arange(self.train) * self.groups // self.train

    def load(self) -> dict[str, Examples]:
        (images, labels), test = self.digits()
        generator = torch.Generator().manual_seed(self.split_seed)
        order = torch.randperm(len(labels), generator=generator)
        lower, upper = order[: self.train], order[self.train : self.train + self.validation]
        noisy = labels[lower].clone()
        for g in range(self.groups):
            members = (self.group == g).nonzero().flatten()
            share = self.wrong * g / max(1, self.groups - 1)
            chosen = members[torch.randperm(len(members), generator=generator)[: round(share * len(members))]]
            # A shift by 1 to 9 classes: a label that is chosen is always wrong afterwards.
            noisy[chosen] = (noisy[chosen] + torch.randint(1, 10, (len(chosen),), generator=generator)) % 10
        return {
            "lower": (self.inputs(images[lower]), noisy),
            "upper": (self.inputs(images[upper]), labels[upper]),
            "test": (self.inputs(test[0]), test[1]),
        }

    def _minibatches(self, split: str, generator: torch.Generator | None) -> Iterator[Minibatch]:
        x, y = self.splits[split]
        # A refit's split begins with the training images. The rest, validation images, is in the clean group.
        group = torch.cat([self.group, torch.full((len(x),), self.groups)])[: len(x)]
        yield GroupedBatch(x, y, group, len(x))  # type: ignore[misc]

    def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: GroupedBatch) -> Tensor:
        weights = [hyperparameters["weight"][f"g{g}"] for g in range(self.groups)]
        # (groups + 1,) -> (n,)
        weight = torch.stack([*weights, torch.ones_like(weights[0])])[batch.group]
        loss = (weight * cross_entropy(model(batch.x), batch.y, reduction="none")).mean()
        return loss + self.decay / 2 * model.get_parameter("weight").square().sum()


class HyperCleaning(Cleaning):
    """Cleaning of MNIST.

    pool: whether inputs are the 14 x 14 means of 2 x 2 pixels instead of the 784 pixels.
    """

    images = 60_000

    def __init__(
        self,
        data: str | None = None,
        train: int = 1000,
        validation: int = 500,
        groups: int = 20,
        wrong: float = 0.8,
        decay: float = 1e-3,
        pool: bool = True,
        split_seed: int = 0,
    ) -> None:
        super().__init__(train, validation, groups, wrong, decay, split_seed)
        self.data, self.pool = data_folder(self, data), pool
        self.features = 196 if pool else 784

    def digits(self) -> tuple[Examples, Examples]:
        return datasets.mnist(self.data)

    def inputs(self, images: Tensor) -> Tensor:
        return pooled(images, self.dtype) if self.pool else images.flatten(1).to(self.dtype) / 255


class DigitsCleaning(Cleaning):
    """Cleaning of scikit-learn's 8 x 8 digits. Of the 1,797 images, 1,000 are for the test."""

    features = PIXELS
    images = EXAMPLES - 1000

    def __init__(
        self,
        train: int = 600,
        validation: int = 150,
        groups: int = 20,
        wrong: float = 0.8,
        decay: float = 1e-3,
        split_seed: int = 0,
    ) -> None:
        super().__init__(train, validation, groups, wrong, decay, split_seed)

    def digits(self) -> tuple[Examples, Examples]:
        splits = digits_splits(self.images, 0, self.split_seed, self.dtype)
        return splits["lower"], splits["test"]

    def inputs(self, images: Tensor) -> Tensor:
        return images
