"""Both levels around one trained point, f tilted so that the training ended at a stationary point of it."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from raybilevel._lower.functions import LevelGradient, finite
from raybilevel._lower.levels import Levels
from raybilevel._lower.linearisation import Differences, inner
from raybilevel._lower.precision import Narrowest
from raybilevel.errors import NotFiniteError
from raybilevel.problem import Level


class Evaluation(NamedTuple):
    """F and tilted f (see `TrainedPoint`) at (x, y), with their gradients."""

    upper: LevelGradient
    lower: LevelGradient


class TrainedPoint:
    """Both levels around one trained point (x_i, y_i), as functions of x and of the displacement y - y_i.

    A training need not have reached a stationary point (SGD, few epochs). So f is tilted by its gradient there,

        f(x, y) - <df/dy(x_i, y_i), y - y_i>,

    which y_i minimises to first order: a descent then answers to the change of x and to F, and does not go on with
    the unfinished training.

    x: x_i, shape (d,), in the unit cube; y: y_i, shape (n,), the weights in the model of `levels`.
    time: for how long each weight was trained, shape (n,) (`TrainedTime`); infinite if the training ended at a minimum;
        None if nobody knows.

    Raises:
        NotFiniteError: a level, or a gradient that a hypergradient needs, is NaN or infinite there.
    """

    def __init__(self, levels: Levels, x: Tensor, time: Tensor | None = None) -> None:
        self.levels, self.x, self.y, self.time = levels, x, levels.y, time
        # The length of differences follows from the type in which this gradient is computed.
        with Narrowest(self.y.dtype) as computed:
            lower = levels.lower(x, self.y)
        self.precision = computed.dtype
        finite("lower", lower.value)
        check_gradient("lower", lower.value, "the weights", lower.in_y)
        self.tilt = lower.in_y
        # The gradient of tilted f is 0 at y_i by construction.
        self.here = Evaluation(self._upper(x, self.y), lower._replace(in_y=torch.zeros_like(self.y)))
        upper = self.here.upper
        check_gradient("upper", upper.value, "the weights", upper.in_y)
        check_gradient("upper", upper.value, "the hyperparameters", upper.in_x)

    @property
    def finite(self) -> bool:
        """Whether the weights were trained for a time that is known and finite."""
        return self.time is not None and not bool(self.time.isinf().any())

    @property
    def still(self) -> Tensor:
        """No displacement."""
        return torch.zeros_like(self.y)

    def evaluate(self, x: Tensor, displacement: Tensor) -> Evaluation:
        """Both levels at x and the displacement.

        Raises:
            NotFiniteError: F or f is NaN or infinite.
        """
        lower = self.lower(x, displacement)
        return Evaluation(self._upper(x, self.y + displacement), lower)

    def lower(self, x: Tensor, displacement: Tensor) -> LevelGradient:
        """Tilted f."""
        found = self.levels.lower(x, self.y + displacement)
        value = finite("lower", found.value) - inner(self.tilt, displacement)
        return LevelGradient(value, found.in_x, found.in_y - self.tilt)

    def _upper(self, x: Tensor, y: Tensor) -> LevelGradient:
        found = self.levels.upper(x, y)
        finite("upper", found.value)
        return found

    @cached_property
    def products(self) -> Differences:
        """Products with the second derivatives of f here; the tilt has none."""
        return Differences(self.levels, self.x, self.y, self.tilt, self.precision)

    @cached_property
    def evaluation_passes(self) -> float:
        """What one evaluation costs, in gradient evaluations of f."""
        # Counted when both levels were evaluated at y_i.
        sizes = self.levels.examples
        return 1 + sizes["upper"] / sizes["lower"]


def check_gradient(level: Level, value: float, what: str, gradient: Tensor) -> None:
    """Raises NotFiniteError, where a level's gradient is not finite. what: the variables it is taken in."""
    if not bool(gradient.isfinite().all()):
        raise NotFiniteError(f"the {level}-level loss is {value:g}, but its gradient in {what} is NaN or infinite")
