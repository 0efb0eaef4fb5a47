"""A deep-equilibrium classifier: the lower level finds its hidden layer, which is the fixed point of a map."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy

from raybilevel.errors import ConfigError
from raybilevel.hypergradient import AndersonAcceleration
from raybilevel.problem import Batch, Hyperparameters, LargeUpperLevel, Level
from raybilevel.problems import _datasets as datasets
from raybilevel.problems._classification import Examples, check_positive, data_folder
from raybilevel.problems.digits import EXAMPLES, digits_splits

CLASSES = 10


class States(nn.Module):
    """The lower-level variable: the hidden state of every example, (n, hidden). It starts at zero."""

    def __init__(self, examples: int, hidden: int) -> None:
        super().__init__()
        self.states = nn.Parameter(torch.zeros(examples, hidden))


class EquilibriumNetwork(nn.Module):
    """The upper-level variable: the weights of the map, and those of the classifier that reads its fixed point."""

    def __init__(self, inputs: int, hidden: int, contraction: float) -> None:
        super().__init__()
        self.inputs, self.readout = nn.Linear(inputs, hidden), nn.Linear(hidden, CLASSES)
        # A matrix of normal numbers has a spectral norm of about 2 sqrt(hidden), so that of W is near 1 at first.
        self.recurrent = nn.Parameter(torch.randn(hidden, hidden) / (2 * hidden**0.5))
        self.contraction = contraction

    def forward(self, states: Tensor, images: Tensor) -> Tensor:
        """The map, (n, hidden) -> (n, hidden), for images, (n, inputs)."""
        if self.contraction == 0:
            return torch.tanh(self.inputs(images))
        # A spectral norm below 1 makes the map a contraction, as tanh has slopes of at most 1.
        norm = torch.linalg.matrix_norm(self.recurrent, 2)
        recurrent = self.recurrent * (self.contraction / norm).clamp(max=1)
        return torch.tanh(states @ recurrent.T + self.inputs(images))


class EquilibriumDigits(LargeUpperLevel):
    """Handwritten digits by a network whose hidden layer is an equilibrium.

    Bai, Kolter & Koltun (2019), arXiv:1909.01377:

        z_i = tanh(W z_i + U image_i + b),    F = mean_i CE(V z_i + c, label_i) + decay |x|^2 / 2

    with x = (W, U, b, V, c) and y all z_i. W is scaled to a spectral norm of at most `contraction`. So there is one
    fixed point, to which every iteration converges. Both levels use the images and labels of the training split, and F
    is the network's training loss. Other images are for the test.

    data:        the folder of the data files, for MNIST averaged over 2x2 pixels; None for scikit-learn's
        8x8 digits.
    train:       number of examples. The rest of the digits, or MNIST's official test images, are for the test.
    hidden:      size of z.
    contraction: below 1; 0 for a plain network with one hidden layer.
    """

    epochs = 1

    def __init__(
        self,
        data: str | None = None,
        train: int = 1000,
        hidden: int = 64,
        contraction: float = 0.9,
        decay: float = 1e-4,
        split_seed: int = 0,
    ) -> None:
        check_positive(train=train, hidden=hidden, decay=decay)
        if not 0 <= contraction < 1:
            raise ConfigError(f"contraction must be from 0 to below 1, got {contraction}")
        most = EXAMPLES - 2 if data is None else 60_000
        if train > most:
            raise ConfigError(f"train: there are {most:,} examples, got {train}")
        self.data = None if data is None else data_folder(self, data)
        self.train, self.hidden, self.contraction = train, hidden, contraction
        self.decay, self.split_seed = decay, split_seed

    @cached_property
    def splits(self) -> dict[str, Examples]:
        if self.data is None:
            # There is no validation split here: the one example in it is left out.
            found = digits_splits(self.train, 1, self.split_seed, self.dtype)
            return {"train": found["lower"], "test": found["test"]}
        (images, labels), test = datasets.mnist(self.data)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(self.split_seed))[: self.train]
        return {
            "train": (self.pooled(images[order]), labels[order]),
            "test": (self.pooled(test.images), test.labels),
        }

    def pooled(self, images: Tensor) -> Tensor:
        return avg_pool2d(images[:, None].to(self.dtype) / 255, 2).flatten(1)

    def __getstate__(self) -> dict[str, Any]:
        # Each process reads the data itself: every node has them.
        return {name: value for name, value in self.__dict__.items() if name != "splits"}

    def batches(self, level: Level, generator: torch.Generator | None) -> Iterator[Examples]:
        yield self.splits["train"]

    def upper_variables(self) -> nn.Module:
        return EquilibriumNetwork(self.splits["train"][0].shape[1], self.hidden, self.contraction)

    def model(self) -> nn.Module:
        return States(self.train, self.hidden)

    def lower_map(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Batch) -> Tensor:
        image: Tensor = hyperparameters["upper"](model.get_parameter("states"), batch[0])
        return image

    def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Batch) -> Tensor:
        """|z - g(z)|^2 / 2, mean over examples: 0 at the equilibrium."""
        residual = self.lower_map(model, hyperparameters, batch) - model.get_parameter("states")
        return residual.square().sum() / (2 * len(residual))

    def upper_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Batch) -> Tensor:
        network = hyperparameters["upper"]
        squares = torch.stack([part.square().sum() for part in network.parameters()]).sum()
        return cross_entropy(network.readout(model.get_parameter("states")), batch[1]) + self.decay / 2 * squares

    def evaluate(self, model: nn.Module, hyperparameters: Hyperparameters) -> dict[str, float]:
        """Loss and accuracy on the test images, at their own equilibria."""
        network = hyperparameters["upper"]
        images, labels = (part.to(self.device) for part in self.splits["test"])
        images = images.to(self.dtype)
        start = torch.zeros(len(images), self.hidden).to(images)
        found = AndersonAcceleration().solve(lambda states: network(states, images), start)
        with torch.no_grad():
            logits = network.readout(found.y)
        return {
            "test_loss": cross_entropy(logits, labels).item(),
            "test_accuracy": (logits.argmax(1) == labels).double().mean().item(),
            "test_iterations": float(found.iterations),
        }
