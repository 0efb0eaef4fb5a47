"""MNIST with wrong labels among the training images."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from raybilevel.errors import ConfigError
from raybilevel.problems import _datasets as datasets

CLASSES = 10


class NoisyMnist(NamedTuple):
    """Images and labels, uint8, (n, 28, 28), and int64, (n,).

    given: the labels of the training images; right: whether each of them is.
    above: clean images and their labels.
    """

    images: Tensor
    given: Tensor
    right: Tensor
    above: datasets.Images
    test: datasets.Images


def check_sizes(train: int, validation: int, wrong: float) -> None:
    if not 0 <= wrong < 1 or train + validation > 60_000:
        raise ConfigError(f"wrong must be from 0 to below 1, and MNIST has 60,000 examples; got {wrong}")


def noisy_mnist(folder: str, train: int, validation: int, wrong: float, seed: int) -> NoisyMnist:
    """Training and clean images drawn by the seed. A wrong label is one of the nine other classes."""
    (images, labels), test = datasets.mnist(folder)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    lower, upper = order[:train], order[train : train + validation]
    false = torch.rand(train, generator=generator) < wrong
    shift = torch.randint(1, CLASSES, (train,), generator=generator)
    given = torch.where(false, (labels[lower] + shift) % CLASSES, labels[lower])
    return NoisyMnist(images[lower], given, ~false, datasets.Images(images[upper], labels[upper]), test)
