"""Both levels at one trained point."""

from __future__ import annotations

from functools import cached_property

from torch import Tensor

from raybilevel._lower.functions import finite
from raybilevel._lower.levels import Levels
from raybilevel._lower.linearisation import Differences
from raybilevel._lower.precision import Narrowest
from raybilevel.errors import NotFiniteError
from raybilevel.problem import Level


class TrainedPoint:
    """Both levels with their gradients at one trained point (x_i, y_i), and products with the second derivatives of f.

    A training need not have reached a stationary point (SGD, few epochs). Then y_i is that of the tilted

        f(x, y) - <df/dy(x_i, y_i), y - y_i>,

    whose second derivatives are those of f: what answers to x and to F does not go on with the unfinished training.

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
            self.lower = levels.lower(x, self.y)
        self.precision = computed.dtype
        finite("lower", self.lower.value)
        check_gradient("lower", self.lower.value, "the weights", self.lower.in_y)
        self.upper = upper = levels.upper(x, self.y)
        finite("upper", upper.value)
        check_gradient("upper", upper.value, "the weights", upper.in_y)
        check_gradient("upper", upper.value, "the hyperparameters", upper.in_x)

    @property
    def finite(self) -> bool:
        """Whether the weights were trained for a time that is known and finite."""
        return self.time is not None and not bool(self.time.isinf().any())

    @cached_property
    def products(self) -> Differences:
        """Products with the second derivatives of f here."""
        return Differences(self.levels, self.x, self.y, self.lower.in_y, self.precision)


def check_gradient(level: Level, value: float, what: str, gradient: Tensor) -> None:
    """Raises NotFiniteError, where a level's gradient is not finite. what: the variables it is taken in."""
    if not bool(gradient.isfinite().all()):
        raise NotFiniteError(f"the {level}-level loss is {value:g}, but its gradient in {what} is NaN or infinite")
