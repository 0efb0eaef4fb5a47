"""Long-tailed MNIST: few examples of most classes, with a loss weight and a logit shift for each class."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from raybilevel.problem import Hyperparameters
from raybilevel.problems import _datasets as datasets
from raybilevel.problems._classification import Examples, Minibatch, check_positive, data_folder
from raybilevel.problems._logistic import Logistic, pooled
from raybilevel.space import Parameter, Space

CLASSES = 10


class LongTailed(Logistic):
    """MNIST digits with rare classes: a weight and a shift of the logits for each class.

    f = mean_i weight_y(i) * cross-entropy(z_i + shift, y_i) + decay |W|^2 / 2, with z the logits of a linear model.

    The classes' frequencies fall geometrically, from `largest` images of 0 to `largest / ratio` of 9. Validation data
    are balanced. F and the test loss have neither weights nor shifts. Inputs are means of 2 x 2 pixels. A refit
    includes the balanced validation images, so its classes are less unequal.
    """

    features = 196

    def __init__(
        self,
        data: str | None = None,
        largest: int = 400,
        ratio: float = 100.0,
        validation: int = 500,
        decay: float = 1e-3,
        split_seed: int = 0,
    ) -> None:
        check_positive(largest=largest, ratio=ratio, validation=validation, decay=decay)
        self.data = data_folder(self, data)
        self.largest, self.ratio, self.validation = largest, ratio, validation
        self.decay, self.split_seed = decay, split_seed

    @property
    def space(self) -> Space:
        classes = range(CLASSES)
        weights = [Parameter(("weight", f"c{c}"), 0.1, 10.0, log=True) for c in classes]
        shifts = [Parameter(("shift", f"c{c}"), -3.0, 3.0) for c in classes]
        return Space((*weights, *shifts))

    @property
    def counts(self) -> list[int]:
        """Training images per class."""
        return [max(1, round(self.largest * self.ratio ** (-c / (CLASSES - 1)))) for c in range(CLASSES)]

    def load(self) -> dict[str, Examples]:
        (images, labels), test = datasets.mnist(self.data)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(self.split_seed))
        lower, upper = [], []
        for c, count in enumerate(self.counts):
            members = order[labels[order] == c]
            # Validation images first, as many of each class, whatever is left for training.
            share = self.validation // CLASSES
            upper.append(members[:share])
            lower.append(members[share : share + count])
        below, above = torch.cat(lower), torch.cat(upper)
        return {
            "lower": (pooled(images[below], self.dtype), labels[below]),
            "upper": (pooled(images[above], self.dtype), labels[above]),
            "test": (pooled(test.images, self.dtype), test.labels),
        }

    def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Minibatch) -> Tensor:
        weight, shift = (
            torch.stack([hyperparameters[kind][f"c{c}"] for c in range(CLASSES)]) for kind in ("weight", "shift")
        )
        loss = (weight[batch.y] * cross_entropy(model(batch.x) + shift, batch.y, reduction="none")).mean()
        return loss + self.decay / 2 * model.get_parameter("weight").square().sum()
