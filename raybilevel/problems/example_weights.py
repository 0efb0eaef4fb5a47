"""Data hyper-cleaning with a weight of its own for each training example."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from raybilevel.problem import Hyperparameters, LargeUpperLevel, Level
from raybilevel.problems._classification import Examples, SplitData, check_positive, data_folder
from raybilevel.problems._noisy import CLASSES, check_sizes, noisy_mnist

PIXELS = 784


class Numbered(NamedTuple):
    """Inputs, (n, 784), the labels given, (n,), and the numbers of the training examples, (n,)."""

    x: Tensor
    y: Tensor
    number: Tensor


class Weights(nn.Module):
    """The upper-level variables: a logit for each training example, whose weight is its sigmoid."""

    def __init__(self, examples: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(examples))

    def forward(self, number: Tensor) -> Tensor:
        return torch.sigmoid(self.logits[number])


class ExampleWeights(LargeUpperLevel, SplitData):
    """Hyper-cleaning of MNIST with a weight for each of the training examples:

        f(x, y) = mean_i sigmoid(x_i) CE_i(y) + decay |y|^2 / 2,   F = CE on clean examples

    as in Franceschi et al. 2017 (arXiv:1703.01785) and, by these sizes, Shen & Chen 2023 (arXiv:2302.05185). The model
    is linear on the pixels, or has one hidden layer with sigmoids.

    data:       the folder of the data files.
    wrong:      share of training labels that are wrong, drawn from the nine other classes.
    hidden:     width of the hidden layer; 0 for a linear model.
    """

    epochs = 100

    def __init__(
        self,
        data: str | None = None,
        train: int = 5000,
        validation: int = 5000,
        wrong: float = 0.5,
        hidden: int = 0,
        decay: float = 1e-3,
        split_seed: int = 0,
    ) -> None:
        check_positive(train=train, validation=validation, decay=decay)
        check_sizes(train, validation, wrong)
        self.data = data_folder(self, data)
        self.train, self.validation, self.wrong, self.hidden = train, validation, wrong, hidden
        self.decay, self.split_seed = decay, split_seed

    def load(self) -> dict[str, Examples]:
        found = noisy_mnist(self.data, self.train, self.validation, self.wrong, self.split_seed)
        # Beside the splits, whose entries are pairs. It is dropped with them when the problem is sent.
        self._right = found.right
        return {
            "lower": (self.inputs(found.images), found.given),
            "upper": (self.inputs(found.above.images), found.above.labels),
            "test": (self.inputs(found.test.images), found.test.labels),
        }

    def inputs(self, images: Tensor) -> Tensor:
        return images.to(self.dtype).flatten(1) / 255

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "_right"}

    def batches(self, level: Level, generator: torch.Generator | None) -> Iterator[Any]:
        x, y = self.splits[level]
        yield Numbered(x, y, torch.arange(len(y)))

    def upper_variables(self) -> nn.Module:
        return Weights(self.train)

    def model(self) -> nn.Module:
        if not self.hidden:
            return nn.Linear(PIXELS, CLASSES)
        return nn.Sequential(nn.Linear(PIXELS, self.hidden), nn.Sigmoid(), nn.Linear(self.hidden, CLASSES))

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)

    def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Numbered) -> Tensor:
        losses = cross_entropy(model(batch.x), batch.y, reduction="none")
        squares = torch.stack([part.square().sum() for part in model.parameters()]).sum()
        loss: Tensor = (hyperparameters["upper"](batch.number) * losses).mean() + self.decay / 2 * squares
        return loss

    def upper_loss(self, model: nn.Module, batch: Numbered) -> Tensor:
        return cross_entropy(model(batch.x), batch.y)

    def evaluate(self, model: nn.Module, hyperparameters: Hyperparameters) -> dict[str, float]:
        """Test metrics, and precision, recall and F1 of finding the right labels by weights above a half."""
        _ = self.splits  # of which the right labels are a part
        kept = hyperparameters["upper"](torch.arange(self.train, device=self.device)).cpu() > 0.5
        found = int((kept & self._right).sum())
        precision, recall = found / max(1, int(kept.sum())), found / max(1, int(self._right.sum()))
        f1 = 2 * precision * recall / max(precision + recall, 1e-12)
        return {**self.test_metrics(model), "precision": precision, "recall": recall, "f1": f1}
