"""Architecture search: the operation of each edge in a convolutional cell, by a continuous relaxation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d, cross_entropy

from raybilevel.errors import ConfigError
from raybilevel.problem import Hyperparameters, LargeUpperLevel, minibatches
from raybilevel.problems import _datasets as datasets
from raybilevel.problems._classification import Examples, Minibatch, SplitData, check_positive, data_folder
from raybilevel.problems.digits import check_split, digits_splits

Source = Literal["digits", "mnist", "cifar10"]
Genotype = tuple[str, ...]
"""The operation of each edge."""

CELLS, CLASSES = 2, 10


def convolution(channels: int, size: int) -> nn.Module:
    """A convolution with group normalisation. Batch normalisation would make the function depend on the batch, and its
    running means would differ between a training and a hypergradient."""
    # affine=False below, as in DARTS: learned scales would undo the comparison of operations by their mixing weights.
    layer = nn.Conv2d(channels, channels, size, padding=size // 2, bias=False)
    return nn.Sequential(nn.ReLU(), layer, nn.GroupNorm(1, channels, affine=False))


# Without normalisation every edge became max pooling within five steps: its output is larger while the convolutions
# are untrained.
def pooling(channels: int, pool: nn.Module) -> nn.Module:
    """A pooling, normalised to the size of a convolution's output, so that the weights of both are comparable."""
    return nn.Sequential(pool, nn.GroupNorm(1, channels, affine=False))


OPERATIONS: dict[str, Callable[[int], nn.Module]] = {
    # Not normalised: that lowered the accuracy (docs/explanation/families.md, "What did not help").
    "skip": lambda channels: nn.Identity(),
    "average_pool": lambda channels: pooling(channels, nn.AvgPool2d(3, 1, 1, count_include_pad=False)),
    "max_pool": lambda channels: pooling(channels, nn.MaxPool2d(3, 1, 1)),
    "convolution_1": lambda channels: convolution(channels, 1),
    "convolution_3": lambda channels: convolution(channels, 3),
}


def edges(nodes: int) -> list[tuple[int, int]]:
    """All (i, j) with i < j for the nodes j = 1, ..., nodes of a cell. Node 0 is the input."""
    return [(i, j) for j in range(1, nodes + 1) for i in range(j)]


class Cell(nn.Module):
    """A cell. Node j is the weighted sum of its edges' operations on the earlier nodes. The output is the mean of all
    nodes except the input."""

    def __init__(self, channels: int, nodes: int, choices: Sequence[Sequence[str]]) -> None:
        super().__init__()
        self.edges = edges(nodes)
        self.operations = nn.ModuleList(nn.ModuleList(OPERATIONS[name](channels) for name in few) for few in choices)

    def forward(self, x: Tensor, weights: Sequence[Tensor]) -> Tensor:
        nodes = {0: x}
        for (i, j), few, weight in zip(self.edges, self.operations, weights, strict=True):
            assert isinstance(few, nn.ModuleList)
            # The mixture of edge (i, j). Every operation keeps the shape (n, channels, h, w).
            term = torch.stack([w * operation(nodes[i]) for w, operation in zip(weight, few, strict=True)]).sum(0)
            nodes[j] = nodes[j] + term if j in nodes else term
        return torch.stack([nodes[j] for j in nodes if j > 0]).mean(0)


class CellNetwork(nn.Module):
    """3x3 convolution, cell, 2x2 max pooling, cell, means over grid x grid parts of the image, linear layer.

    choices: the operations of each edge. With one per edge it is an ordinary network.
    """

    def __init__(self, inputs: int, channels: int, nodes: int, grid: int, choices: Sequence[Sequence[str]]) -> None:
        super().__init__()
        self.grid = grid
        self.stem = nn.Sequential(
            nn.Conv2d(inputs, channels, 3, padding=1, bias=False), nn.GroupNorm(1, channels, affine=False)
        )
        self.cells = nn.ModuleList(Cell(channels, nodes, choices) for _ in range(CELLS))
        self.pool = nn.MaxPool2d(2)
        self.last = nn.Linear(grid**2 * channels, CLASSES)
        # A plain list, so that these are neither weights nor buffers.
        self.plain = [torch.ones(len(few)) for few in choices]

    def forward(self, x: Tensor, weights: Sequence[Tensor] | None = None) -> Tensor:
        """(n, inputs, h, w) -> (n, 10). weights: of each edge's operations; 1 by default."""
        given = [one.to(x) for one in self.plain] if weights is None else weights
        x = self.stem(x)
        for number, cell in enumerate(self.cells):
            x = cell(self.pool(x) if number else x, given)
        logits: Tensor = self.last(adaptive_avg_pool2d(torch.relu(x), self.grid).flatten(1))
        return logits


class MixingWeights(nn.Module):
    """The upper-level variable: logits, (edges, operations), whose softmax mixes the operations. They start near 0."""

    def __init__(self, nodes: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(1e-3 * torch.randn(len(edges(nodes)), len(OPERATIONS)))

    def forward(self) -> Tensor:
        return self.logits.softmax(1)


class Architecture(LargeUpperLevel, SplitData):
    """A cell whose edges mix operations, after DARTS (Liu, Simonyan & Yang 2019, arXiv:1806.09055):

        f(x, y) = CE(y; mixed by softmax x) + decay |y|^2 / 2 on training images,    F = CE on validation images

    At the end each edge keeps the operation with the largest weight. That network is trained from random weights on the
    training images. There is no operation "none", as its weight would say nothing about the others.

    The test examples are the remaining digits, or the first `test` of the official ones.

    source:        "digits" (8 x 8), or from the data folder "mnist" (averaged to 14 x 14) or "cifar10" (16 x 16).
    nodes, channels: of each of the two cells, which have the same architecture.
    grid:          the last layer sees the means of grid x grid parts of the image; by default of all of it, as in
        DARTS.
    epochs:        of a training of one architecture.
    search_epochs: of the mixed network before the first step.
    """

    def __init__(
        self,
        data: str | None = None,
        source: Source = "digits",
        train: int = 300,
        validation: int = 300,
        test: int = 1000,
        nodes: int = 3,
        channels: int = 8,
        # With the means of 2 x 2 parts architectures hardly differ (families.md).
        grid: int = 1,
        # After 40 epochs most architectures have not converged (families.md).
        epochs: int = 100,
        search_epochs: int = 20,
        batch: int = 50,
        learning_rate: float = 0.05,
        decay: float = 1e-3,
        split_seed: int = 0,
    ) -> None:
        if source not in get_args(Source):
            raise ConfigError(f"unknown source {source!r}; choose one of {', '.join(get_args(Source))}")
        check_positive(train=train, validation=validation, test=test, nodes=nodes, channels=channels, grid=grid)
        check_positive(
            batch=batch, epochs=epochs, search_epochs=search_epochs, learning_rate=learning_rate, decay=decay
        )
        if source == "digits":
            check_split(train, validation)
        self.source, self.data = source, None if source == "digits" else data_folder(self, data)
        self.train, self.validation, self.test, self.split_seed = train, validation, test, split_seed
        self.nodes, self.channels, self.grid, self.batch = nodes, channels, grid, batch
        # A lower-level training is one of the mixed network, so `epochs` of the problem are those of the search.
        self.training_epochs, self.epochs = epochs, search_epochs
        self.learning_rate, self.decay = learning_rate, decay

    def load(self) -> dict[str, Examples]:
        if self.source == "digits":
            splits = digits_splits(self.train, self.validation, self.split_seed, self.dtype)
            return {name: (2 * x.view(-1, 1, 8, 8) - 1, y) for name, (x, y) in splits.items()}
        assert self.data is not None
        total = self.train + self.validation
        if self.source == "mnist":
            train, test = datasets.mnist(self.data)
        else:
            train, test = datasets.cifar10(self.data, total, self.test)
        if len(train.labels) < total:
            raise ConfigError(f"{self.source} has {len(train.labels):,} training images; asked for {total:,}")
        # Of CIFAR-10 only `total` images were read, so there this shuffles them. MNIST is drawn from all of its images.
        order = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(self.split_seed))[:total]
        lower, upper = order.split([self.train, self.validation])
        return {
            "lower": (self.inputs(train.images[lower]), train.labels[lower]),
            "upper": (self.inputs(train.images[upper]), train.labels[upper]),
            "test": (self.inputs(test.images[: self.test]), test.labels[: self.test]),
        }

    def inputs(self, images: Tensor) -> Tensor:
        """uint8, (n, 28, 28) or (n, 3, 32, 32) -> means of 2 x 2 pixels, in [-1, 1], (n, 1 or 3, h / 2, w / 2)."""
        grey = images[:, None] if images.dim() == 3 else images
        return avg_pool2d(2 * grey.to(self.dtype) / 255 - 1, 2)

    def model(self) -> nn.Module:
        return self.network([tuple(OPERATIONS)] * len(edges(self.nodes)))

    def network(self, choices: Sequence[Sequence[str]]) -> nn.Module:
        return CellNetwork(3 if self.source == "cifar10" else 1, self.channels, self.nodes, self.grid, choices)

    def upper_variables(self) -> nn.Module:
        return MixingWeights(self.nodes)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=self.learning_rate, momentum=0.9, nesterov=True)

    def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Minibatch) -> Tensor:
        return self.regularised(model, model(batch.x, hyperparameters["upper"]()), batch.y)

    def regularised(self, model: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
        squares = torch.stack([w.square().sum() for w in model.parameters()]).sum()
        return cross_entropy(logits, labels) + self.decay / 2 * squares

    def upper_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Minibatch) -> Tensor:
        return cross_entropy(model(batch.x, hyperparameters["upper"]()), batch.y)

    def evaluate(self, model: nn.Module, hyperparameters: Hyperparameters) -> dict[str, float]:
        """Metrics of the final architecture, trained from scratch: loss and accuracy on validation and test data.

        `convolutions` is the number of its edges that are convolutions. `least_weight` is the smallest weight of an
        operation that was kept.
        """
        mixing = hyperparameters["upper"]
        found = self.trained(genotype(mixing))
        found["convolutions"] = float(sum(name.startswith("convolution") for name in genotype(mixing)))
        found["least_weight"] = mixing().max(1).values.min().item()
        return found

    def trained(self, operations: Genotype, seed: int = 0) -> dict[str, float]:
        """`validation_loss`, `validation_accuracy`, `test_loss` and `test_accuracy` of an architecture.

        It is trained from random weights on the training images for `epochs`. The rate falls to 0 along a cosine.
        """
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.network([(name,) for name in operations]).to(self.device, self.dtype)
        optimizer = self.optimizer(model)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.training_epochs)
        # `evaluate` runs without gradients.
        with torch.enable_grad():
            for _ in range(self.training_epochs):
                for batch in self._minibatches("lower", generator):
                    optimizer.zero_grad()
                    x, y = batch.x.to(self.device, self.dtype), batch.y.to(self.device)
                    self.regularised(model, model(x), y).backward()
                    optimizer.step()
                schedule.step()
        found: dict[str, float] = {}
        for name, split in (("validation", "upper"), ("test", "test")):
            loss, accuracy = self.judged(model, split)
            found |= {f"{name}_loss": loss, f"{name}_accuracy": accuracy}
        return found

    def judged(self, model: nn.Module, split: str) -> tuple[float, float]:
        """Mean loss and accuracy on a split."""
        loss, right, count = 0.0, 0, len(self.splits[split][0])
        with torch.no_grad():
            for x, y in minibatches(self.splits[split], 500, None):
                logits, labels = model(x.to(self.device, self.dtype)), y.to(self.device)
                loss += cross_entropy(logits, labels, reduction="sum").item()
                right += int((logits.argmax(1) == labels).sum())
        return loss / count, right / count

    def multiply_adds(self, operations: Sequence[Sequence[str]]) -> float:
        """Multiplications with additions for one image, in the convolutions of a network with these operations."""
        height = self.splits["lower"][0].shape[-1]
        kernel = sum({"convolution_1": 1, "convolution_3": 9}.get(name, 0) for few in operations for name in few)
        inputs = self.splits["lower"][0].shape[1]
        # The second cell comes after a 2 x 2 pooling.
        pixels = height**2 + (height // 2) ** 2
        # The stem's 3 x 3 convolution, then the cells'.
        return float(9 * inputs * self.channels * height**2 + kernel * self.channels**2 * pixels)


def genotype(mixing: nn.Module) -> Genotype:
    """The operation with the largest weight of each edge."""
    names = tuple(OPERATIONS)
    return tuple(names[number] for number in mixing().argmax(1).tolist())


def random_genotype(nodes: int, generator: torch.Generator) -> Genotype:
    """A random architecture, in which every operation is equally likely."""
    names = tuple(OPERATIONS)
    drawn = torch.randint(len(names), (len(edges(nodes)),), generator=generator)
    return tuple(names[number] for number in drawn.tolist())
