"""MNIST: weight decay of a multilayer perceptron, for all layers or per layer."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from raybilevel.errors import ConfigError
from raybilevel.problems import _datasets as datasets
from raybilevel.problems._classification import (
    Examples,
    LayerDecay,
    Minibatch,
    PenaltyScale,
    Share,
    check_positive,
    data_folder,
)
from raybilevel.space import Parameter, Space

SIDE = 28
"""Pixels in a row and in a column."""


class MnistPerceptron(LayerDecay):
    """A ReLU network 784-hidden-10 with layers fc1, fc2, ... on pixels / 255.

    The defaults are the published setting of `LayerDecay`'s paper. Its authors used Keras, so the initial weights are
    drawn as Keras does: Glorot uniform, biases 0.

    data: the folder of the data files. On a cluster every node needs it.
    """

    decays: tuple[str, ...] = ("weight_decay",)
    """The kinds of decay that f has."""

    def __init__(
        self,
        data: str | None = None,
        hidden: Sequence[int] = (100,),
        batch: int = 64,
        epochs: int = 50,
        learning_rate: float = 0.5,
        momentum: float = 0.08,
        share: Share = "layer",
        penalty_scale: PenaltyScale = "paper",
    ) -> None:
        super().__init__(
            batch=batch,
            epochs=epochs,
            learning_rate=learning_rate,
            momentum=momentum,
            share=share,
            penalty_scale=penalty_scale,
        )
        check_positive(hidden=min(hidden, default=1))
        self.hidden = tuple(hidden)
        self.data = data_folder(self, data)

    @property
    def space(self) -> Space:
        """x = log decay from -10 to 5, as published."""
        layers = [(f"fc{number}",) for number in range(1, len(self.hidden) + 2)] if self.share == "layer" else [()]
        paths = [(decay, *layer) for decay in self.decays for layer in layers]
        return Space(tuple(Parameter(path, math.exp(-10), math.exp(5), log=True) for path in paths))

    def model(self) -> nn.Module:
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for number, (inputs, outputs) in enumerate(pairwise((784, *self.hidden, 10)), 1):
            if layers:
                layers[f"relu{number - 1}"] = nn.ReLU()
            layers[f"fc{number}"] = linear = nn.Linear(inputs, outputs)
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        return nn.Sequential(layers)

    def inputs(self, images: Tensor) -> Tensor:
        """Images, (n, 28, 28), as the network takes them, (n, 784)."""
        return images.flatten(1).to(self.dtype) / 255


class Mnist(MnistPerceptron):
    """MNIST by a ReLU network, with a decay for each layer.

    `train` and `validation` examples of the official 60,000, drawn by the seed. The test has the official 10,000.

    shift: pixels by which each training image is moved at most, up or down and left or right, at random in each epoch.
    """

    def __init__(
        self,
        data: str | None = None,
        train: int = 3000,
        validation: int = 2000,
        split_seed: int = 0,
        shift: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(data, **options)
        if shift < 0:
            raise ConfigError(f"shift must be at least 0, got {shift}")
        if train < 1 or validation < 1 or train + validation > 60_000:
            raise ConfigError(
                "MNIST has 60,000 training images to take train and validation examples from, at least one each; "
                f"got {train} + {validation}"
            )
        self.train, self.validation, self.split_seed, self.shift = train, validation, split_seed, shift

    def _minibatches(self, split: str, generator: torch.Generator | None) -> Iterator[Minibatch]:
        for batch in super()._minibatches(split, generator):
            # Without a generator the data are asked for as they are.
            yield batch if generator is None or not self.shift else shifted(batch, self.shift, generator)

    def load(self) -> dict[str, Examples]:
        (images, labels), test = datasets.mnist(self.data)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(self.split_seed))
        lower, upper = order[: self.train], order[self.train : self.train + self.validation]
        return {
            "lower": (self.inputs(images[lower]), labels[lower]),
            "upper": (self.inputs(images[upper]), labels[upper]),
            "test": (self.inputs(test.images), test.labels),
        }


def shifted(batch: Minibatch, most: int, generator: torch.Generator) -> Minibatch:
    """A batch of images, (n, 784), each moved by up to `most` pixels in both directions, with zeros where it was."""
    images = nn.functional.pad(batch.x.reshape(-1, SIDE, SIDE), (most,) * 4)
    corners = torch.randint(0, 2 * most + 1, (2, len(images), 1), generator=generator)
    rows, columns = corners + torch.arange(SIDE)
    moved = images[torch.arange(len(images))[:, None, None], rows[:, :, None], columns[:, None, :]]
    return batch._replace(x=moved.flatten(1))


class Mnist1K(MnistPerceptron):
    """MNIST with 1,000 examples by a ReLU network, with a decay for each layer.

    They are the published 600 training and 400 validation examples. The test split is the official one without the
    images that are among the 1,000: 9,859 images. Without the official test files there is no test split, and there
    are no test metrics.
    """

    def load(self) -> dict[str, Examples]:
        lower, upper = datasets.mnist_1k(self.data)
        splits = {
            "lower": (self.inputs(lower.images), lower.labels),
            "upper": (self.inputs(upper.images), upper.labels),
        }
        if datasets.has_mnist_test(self.data):
            images, labels = datasets.mnist_test(self.data)
            seen = {image.numpy().tobytes() for split in (lower, upper) for image in split.images}
            unseen = torch.tensor([image.numpy().tobytes() not in seen for image in images])
            splits["test"] = self.inputs(images[unseen]), labels[unseen]
        return splits
