"""scikit-learn's 8 x 8 digits: weight decay per layer of a small network, or per group of pixels of a linear one."""

from __future__ import annotations

from collections import OrderedDict

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from raybilevel.errors import ConfigError
from raybilevel.problem import Hyperparameters
from raybilevel.problems._classification import Examples, LayerDecay, Minibatch
from raybilevel.problems._logistic import Logistic
from raybilevel.space import Parameter, Space

PIXELS, CLASSES, EXAMPLES = 64, 10, 1797


def digits_splits(train: int, validation: int, seed: int, dtype: torch.dtype) -> dict[str, Examples]:
    """The 1,797 digits with pixels in [0, 1], shuffled by the seed. The test split has the remaining examples."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(EXAMPLES, generator=torch.Generator().manual_seed(seed))
    # Pixels are whole numbers from 0 to 16.
    x, y = torch.tensor(images / 16.0, dtype=dtype)[order], torch.tensor(labels)[order]
    cut = train + validation
    return {"lower": (x[:train], y[:train]), "upper": (x[train:cut], y[train:cut]), "test": (x[cut:], y[cut:])}


def check_split(train: int, validation: int) -> None:
    if train < 1 or validation < 1 or train + validation >= EXAMPLES:
        raise ConfigError(
            f"digits has {EXAMPLES:,} examples; train and validation take at least one each and must leave some for "
            f"the test, got {train} + {validation}"
        )


class DigitsPerceptron(LayerDecay):
    """A tanh network 64-hidden-10 with layers fc1, fc2, fc3, trained by SGD. Each layer has a weight decay."""

    def __init__(
        self,
        train: int = 150,
        validation: int = 300,
        hidden: tuple[int, int] = (48, 24),
        batch: int = 50,
        epochs: int = 60,
        learning_rate: float = 0.1,
        momentum: float = 0.9,
        split_seed: int = 0,
    ) -> None:
        super().__init__(batch=batch, epochs=epochs, learning_rate=learning_rate, momentum=momentum)
        check_split(train, validation)
        self.train, self.validation, self.hidden, self.split_seed = train, validation, tuple(hidden), split_seed

    def load(self) -> dict[str, Examples]:
        return digits_splits(self.train, self.validation, self.split_seed, self.dtype)

    def model(self) -> nn.Module:
        first, second = self.hidden
        return nn.Sequential(
            OrderedDict(
                fc1=nn.Linear(PIXELS, first),
                tanh1=nn.Tanh(),
                fc2=nn.Linear(first, second),
                tanh2=nn.Tanh(),
                fc3=nn.Linear(second, CLASSES),
            )
        )


class DigitsLogistic(Logistic):
    """Multinomial logistic regression, one weight decay per group of neighbouring pixels, trained to the optimum:

    f = cross-entropy + sum_g weight_decay_g |W_g|^2 / 2, by full-batch L-BFGS in double precision.

    per_class: a weight decay for each class and group, up to 640.
    """

    features, classes, iterations = PIXELS, CLASSES, 100

    def __init__(
        self, groups: int = 8, train: int = 300, validation: int = 300, split_seed: int = 0, per_class: bool = False
    ) -> None:
        check_split(train, validation)
        if not 1 <= groups <= PIXELS:
            raise ConfigError(f"groups: from 1 to {PIXELS}, got {groups}")
        self.groups, self.train, self.validation, self.split_seed = groups, train, validation, split_seed
        self.per_class = per_class

    @property
    def space(self) -> Space:
        count = self.groups * CLASSES if self.per_class else self.groups
        return Space(tuple(Parameter(("weight_decay", f"g{g}"), 1e-6, 10.0, log=True) for g in range(count)))

    def load(self) -> dict[str, Examples]:
        return digits_splits(self.train, self.validation, self.split_seed, self.dtype)

    def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Minibatch) -> Tensor:
        return cross_entropy(model(batch.x), batch.y) + self.group_penalty(model, hyperparameters["weight_decay"])
