"""A cross-validated loss of linear models as a function of one penalty per group of features."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]
LOWEST, HIGHEST = 1e-4, 1e4
"""Penalties that are searched, in units of a feature's mean sum of squares."""


class Fold(NamedTuple):
    """Inputs, (n, p), and targets, (n, m), of the part that is trained on and of the part that is held out."""

    inputs: Array
    targets: Array
    held_out: Array
    held_out_targets: Array


@dataclass(frozen=True)
class Penalties:
    """The box of the search: one penalty per group, on a logarithmic scale.

    group: of each feature, shape (p,), numbers from 0 to d - 1.
    unit:  a feature's mean sum of squares.
    """

    group: NDArray[np.intp]
    unit: float

    @classmethod
    def of(cls, inputs: Array, group: NDArray[np.intp]) -> Penalties:
        unit = float(np.square(inputs - inputs.mean(0)).sum(0).mean())
        return cls(group, unit if unit > 0 else 1.0)

    @property
    def dimension(self) -> int:
        return int(self.group.max()) + 1

    def at(self, x: Tensor) -> Array:
        """Of each group, at a point of the unit cube, shape (d,)."""
        low, high = np.log(LOWEST * self.unit), np.log(HIGHEST * self.unit)
        penalties: Array = np.exp(low + (high - low) * x.numpy())
        return penalties

    def by_group(self, of_features: Array) -> Array:
        """Sums over the features of each group, shape (p, ...) -> (d, ...)."""
        sums = np.zeros((self.dimension, *of_features.shape[1:]))
        # `sums[group] += ...` would add one feature of each group only.
        np.add.at(sums, self.group, of_features)
        return sums


WIDTH = float(np.log(HIGHEST / LOWEST))
"""By so much the logarithm of a penalty changes across the unit cube."""


class FoldLoss(ABC):
    """The mean loss of the examples where they are held out, F, and G of it (`_models.shrinkage`), in the unit cube.

    examples: the terms of that mean, n.
    """

    def __init__(self, folds: Sequence[Fold], penalties: Penalties) -> None:
        self.folds, self.penalties = folds, penalties
        self.examples = sum(fold.held_out_targets.size for fold in folds)

    @abstractmethod
    def upper(self, x: Tensor) -> float:
        """F."""

    @abstractmethod
    def value_and_gradient(self, x: Tensor) -> tuple[float, Tensor]:
        """G, and its gradient, shape (d,)."""

    @abstractmethod
    def hessian(self, x: Tensor) -> Tensor:
        """Of G, shape (d, d), by Gauss and Newton: without the second derivatives of the trained weights."""

    def value(self, x: Tensor) -> float:
        return self.value_and_gradient(x)[0]


def as_tensor(array: Any) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float64))
