"""A network that weights the training examples of another one, as some of their labels are wrong."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy

from raybilevel.hypergradient import BilevelFunctions, solve_lower
from raybilevel.problem import Hyperparameters, LargeUpperLevel, Level
from raybilevel.problems._classification import Examples, SplitData, check_positive, data_folder
from raybilevel.problems._noisy import CLASSES, check_sizes, noisy_mnist

PIXELS = 14 * 14


class Weighted(NamedTuple):
    """Weighted examples.

    x, y:  inputs, (n, 196), and the labels given, (n,).
    signs: the inputs of the weight network, (n, 2).
    right: whether the label is right, (n,). Only metrics use it.
    """

    x: Tensor
    y: Tensor
    signs: Tensor
    right: Tensor


class WeightNetwork(nn.Module):
    """The upper-level variable: a network 2-hidden-1 from signs of wrong labels, (n, 2), to weights in (0, 1), (n,)."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(2, hidden), nn.Linear(hidden, 1)

    def forward(self, signs: Tensor) -> Tensor:
        return torch.sigmoid(self.last(torch.tanh(self.first(signs)))[:, 0])


class NoisyLabels(LargeUpperLevel, SplitData):
    """Multinomial logistic regression on MNIST digits with a share of wrong labels. A network weights the examples:

        f(x, y) = sum_i w_x(signs_i) CE_i(y) / sum_i w_x(...) + decay |y|^2 / 2,   F = CE on clean examples

    It follows Meta-Weight-Net (Shu et al. 2019), whose network sees the current loss of an example. Here it sees the
    losses of two models that were trained before: one on all training examples with equal weights, one on half of the
    clean ones. So f is convex in y. F is taken on the other half. A network of the image and the label themselves, with
    thousands of weights, overfitted the few clean examples.

    Test metrics are of the official test images. All images are averaged over 2x2 pixels.

    data:       the folder of the data files.
    train:      number of training examples.
    validation: number of clean examples.
    wrong:      share of training labels that are wrong, drawn from the nine other classes.
    hidden:     size of the weight network.
    """

    epochs = 1

    def __init__(
        self,
        data: str | None = None,
        train: int = 4000,
        validation: int = 200,
        wrong: float = 0.5,
        hidden: int = 32,
        decay: float = 1e-3,
        split_seed: int = 0,
    ) -> None:
        check_positive(train=train, validation=validation, hidden=hidden, decay=decay)
        check_sizes(train, validation, wrong)
        self.data = data_folder(self, data)
        self.train, self.validation, self.wrong, self.hidden = train, validation, wrong, hidden
        self.decay, self.split_seed = decay, split_seed

    def load(self) -> dict[str, Examples]:
        found = noisy_mnist(self.data, self.train, self.validation, self.wrong, self.split_seed)
        # Beside the splits, whose entries are pairs. It is dropped with them when the problem is sent.
        self._right = found.right
        above, labels, half = self.inputs(found.above.images), found.above.labels, self.validation // 2
        return {
            "lower": (self.inputs(found.images), found.given),
            "upper": (above[half:], labels[half:]),
            # Apart from F's examples: the signs are losses of a model that was trained on these.
            "guide": (above[:half], labels[:half]),
            "test": (self.inputs(found.test.images), found.test.labels),
        }

    def inputs(self, images: Tensor) -> Tensor:
        return avg_pool2d(images[:, None].to(self.dtype) / 255, 2).flatten(1)

    def batches(self, level: Level, generator: torch.Generator | None) -> Any:
        x, y = self.splits[level]
        if level == "upper":
            # F needs no signs. Any tensor of their shape will do.
            yield Weighted(x, y, x[:, :2], torch.ones_like(y, dtype=torch.bool))
        else:
            yield Weighted(x, y, self.signs, self._right)

    @cached_property
    def signs(self) -> Tensor:
        """The losses of the training examples under the two models, scaled to mean 0 and deviation 1, (n, 2)."""
        (x, y), (clean_x, clean_y) = self.splits["lower"], self.splits["guide"]
        losses = [
            cross_entropy(self.fitted(inputs, labels, torch.ones_like(inputs[:, 0]))(x), y, reduction="none")
            for inputs, labels in ((x, y), (clean_x, clean_y))
        ]
        found = torch.stack(losses, 1)
        return (found - found.mean(0)) / found.std(0)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name not in ("_right", "signs")}

    def upper_variables(self) -> nn.Module:
        return WeightNetwork(self.hidden)

    def model(self) -> nn.Module:
        return nn.Linear(PIXELS, CLASSES)

    def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Weighted) -> Tensor:
        weights = hyperparameters["upper"](batch.signs)
        return self.weighted_loss(model(batch.x), batch.y, weights) + self.decay / 2 * _squares(model)

    @staticmethod
    def weighted_loss(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        losses = cross_entropy(logits, labels, reduction="none")
        return (weights * losses).sum() / weights.sum()

    def upper_loss(self, model: nn.Module, batch: Weighted) -> Tensor:
        return cross_entropy(model(batch.x), batch.y)

    def evaluate(self, model: nn.Module, hyperparameters: Hyperparameters) -> dict[str, float]:
        """Test metrics, and test accuracies of the same model with other weights.

        `uniform_accuracy` has equal weights, `validation_only_accuracy` the clean examples alone, and `oracle_accuracy`
        only the examples with right labels. `ranking` is the share of pairs in which an example with a right label has
        more weight than one with a wrong label; 0.5 is chance.
        """
        (batch,) = self.batches("lower", None)
        x, y, right = batch.x.to(self.device), batch.y.to(self.device), batch.right.to(self.device)
        weights = hyperparameters["upper"](batch.signs.to(self.device))
        halves = zip(self.splits["guide"], self.splits["upper"], strict=True)
        clean_x, clean_y = (torch.cat(parts).to(self.device) for parts in halves)
        found = self.test_metrics(model)
        found["uniform_accuracy"] = self.accuracy_of(x, y, torch.ones_like(weights))
        found["validation_only_accuracy"] = self.accuracy_of(clean_x, clean_y, torch.ones_like(clean_x[:, 0]))
        found["oracle_accuracy"] = self.accuracy_of(x, y, right.to(weights))
        if right.any() and not right.all():
            # For each right label the number of wrong ones with less weight, in n log n.
            below = torch.searchsorted(weights[~right].sort().values, weights[right])
            found["ranking"] = below.double().mean().item() / int((~right).sum())
        return found

    def accuracy_of(self, x: Tensor, y: Tensor, weights: Tensor) -> float:
        """The test accuracy of the model trained with these weights."""
        inputs, labels = (part.to(self.device) for part in self.splits["test"])
        return (self.fitted(x, y, weights)(inputs).argmax(1) == labels).double().mean().item()

    def fitted(self, x: Tensor, y: Tensor, weights: Tensor) -> Callable[[Tensor], Tensor]:
        """The logits of the model trained with fixed weights, as a function of inputs."""

        def logits(flat: Tensor, inputs: Tensor) -> Tensor:
            # The weights, (196, 10), then the biases.
            return inputs @ flat[: PIXELS * CLASSES].view(PIXELS, CLASSES) + flat[PIXELS * CLASSES :]

        def lower(_: Tensor, flat: Tensor) -> Tensor:
            return self.weighted_loss(logits(flat, x), y, weights) + self.decay / 2 * flat.square().sum()

        # zero[:0] below is an x without entries: the weights are fixed.
        zero = torch.zeros((PIXELS + 1) * CLASSES, device=x.device, dtype=self.dtype)
        with torch.enable_grad():
            flat = solve_lower(BilevelFunctions([], [lower]), zero[:0], zero, 1e-3, limit=100).y
        return lambda inputs: logits(flat, inputs)


def _squares(model: nn.Module) -> Tensor:
    return torch.stack([part.square().sum() for part in model.parameters()]).sum()
