"""CIFAR-10: weight decay per layer of LeNet-5."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from raybilevel.errors import ConfigError
from raybilevel.problems import _datasets as datasets
from raybilevel.problems._classification import Examples, LayerDecay, check_positive, data_folder
from raybilevel.space import Parameter, Space

LAYERS = ("conv1", "conv2", "fc1", "fc2", "fc3")


class CifarLenet(LayerDecay):
    """LeNet-5 with ReLU and max pooling; layers conv1, conv2, fc1, fc2, fc3.

    Training and validation data are the first train + validation training images, shuffled by the seed. They are the
    same pictures in every form of the files (see `_datasets.cifar10`). There are at most `test` test images, since
    every epoch ends with a test. Channels are normalised by the means and deviations of the training split.
    """

    def __init__(
        self,
        data: str | None = None,
        train: int = 2000,
        validation: int = 2000,
        test: int = 2000,
        batch: int = 64,
        epochs: int = 10,
        learning_rate: float = 0.05,
        momentum: float = 0.9,
        split_seed: int = 0,
    ) -> None:
        super().__init__(batch=batch, epochs=epochs, learning_rate=learning_rate, momentum=momentum)
        self.data = data_folder(self, data)
        check_positive(train=train, validation=validation, test=test)
        self.train, self.validation, self.test, self.split_seed = train, validation, test, split_seed

    @property
    def space(self) -> Space:
        return Space(tuple(Parameter(("weight_decay", layer), 1e-2, 3e2, log=True) for layer in LAYERS))

    def load(self) -> dict[str, Examples]:
        total = self.train + self.validation
        (images, labels), test = datasets.cifar10(self.data, total, self.test)
        if len(labels) < total:
            raise ConfigError(
                f"the CIFAR-10 files in {self.data} hold {len(labels):,} training images; train + validation must be "
                f"at most that, got {self.train} + {self.validation}"
            )
        order = torch.randperm(total, generator=torch.Generator().manual_seed(self.split_seed))
        lower, upper = order[: self.train], order[self.train :]
        deviation, mean = torch.std_mean(images[lower].double() / 255, dim=(0, 2, 3), correction=0, keepdim=True)

        def inputs(images: Tensor) -> Tensor:
            return ((images.double() / 255 - mean) / deviation).to(self.dtype)

        return {
            "lower": (inputs(images[lower]), labels[lower]),
            "upper": (inputs(images[upper]), labels[upper]),
            "test": (inputs(test.images), test.labels),
        }

    def model(self) -> nn.Module:
        return nn.Sequential(
            OrderedDict(
                conv1=nn.Conv2d(3, 6, 5),  # (n, 3, 32, 32) -> (n, 6, 28, 28)
                relu1=nn.ReLU(),
                pool1=nn.MaxPool2d(2),
                conv2=nn.Conv2d(6, 16, 5),  # (n, 6, 14, 14) -> (n, 16, 10, 10)
                relu2=nn.ReLU(),
                pool2=nn.MaxPool2d(2),
                flatten=nn.Flatten(),
                fc1=nn.Linear(16 * 5 * 5, 120),
                relu3=nn.ReLU(),
                fc2=nn.Linear(120, 84),
                relu4=nn.ReLU(),
                fc3=nn.Linear(84, 10),
            )
        )
