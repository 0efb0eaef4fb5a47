"""One hyperparameter: its domain, and its coordinate in the unit cube."""

from __future__ import annotations

import ast
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, PlainSerializer
from torch import Tensor

from raybilevel._tree import Path, named
from raybilevel.errors import SpaceError

Condition = tuple[tuple[int, int], ...]
"""Coordinates of choices and, of each, the number of the value that it must have."""


@dataclass(frozen=True)
class Domain:
    """How a hyperparameter is searched.

    log:     on a logarithmic scale.
    stepped: in multiples of a step.
    integer: whole numbers only.
    normal:  as likely as under a normal distribution, and not uniformly.
    """

    log: bool = False
    stepped: bool = False
    integer: bool = False
    normal: bool = False

    @property
    def arguments(self) -> tuple[str, ...]:
        """What it takes, in order."""
        numbers = ("mean", "sd") if self.normal else ("low", "high")
        return (*numbers, "step") if self.stepped else numbers


DOMAINS: dict[str, Domain] = {
    "uniform": Domain(),
    "loguniform": Domain(log=True),
    "quniform": Domain(stepped=True),
    "qloguniform": Domain(log=True, stepped=True),
    "randint": Domain(integer=True),
    "lograndint": Domain(log=True, integer=True),
    "qrandint": Domain(stepped=True, integer=True),
    "qlograndint": Domain(log=True, stepped=True, integer=True),
    "randn": Domain(normal=True),
    "qrandn": Domain(stepped=True, normal=True),
}
"""The domains of numbers, by the names that they have in config files and in Ray Tune. As there, `high` belongs to the
domain, except with "randint" and "lograndint"."""
CHOICE = "choice"
"""The domain of a few values that are named one by one."""
TAIL = 4.0
"""Standard deviations from the mean at which a normal distribution is cut off."""
MOST_LEVELS = 32
"""Whole numbers of more values than this are searched like a continuous hyperparameter and rounded."""

NORMAL = NormalDist()
# What is cut off at either end, a probability of 3e-5.
BELOW = NORMAL.cdf(-TAIL)

Values = Annotated[
    tuple[Any, ...],
    PlainSerializer(lambda values: repr(readable(values)), return_type=str),
    BeforeValidator(lambda given: ast.literal_eval(given) if isinstance(given, str) else given),
]
"""Numbers, texts, None and tuples of these, written as Python does: JSON would make lists of tuples. For others stands
what is readable of them."""


@dataclass(frozen=True)
class Parameter:
    """One hyperparameter: a number between `low` and `high`, or one of `choices`.

    path:    where it stands in the (nested) config, e.g. ("weight_decay", "fc1"), or ("weights", 2) in a list.
    low, high: its bounds, both included, in its own unit.
    log:     searched on a logarithmic scale.
    step:    values are multiples of it (Tune's `q`). None allows any value.
    integer: values are whole numbers.
    normal:  coordinates of the unit cube are quantiles of a normal distribution. It is cut off at `low` and `high`,
        `TAIL` standard deviations from its mean.
    choices: its values, if it is no range. `low` and `high` are then 0 and their number less one. Choices that are all
        numbers are in ascending order, and neighbours are alike. Others are equally unlike.
    smooth:  the losses are differentiable in it, and all of its effect is in them, so that it has hypergradients.
    when:    conditions of which one must hold for it to be active, i.e. to be in the config at all. Always, if there
        are none.
    switch:  its choices are the numbers of alternative parts of the config. It has no entry of its own there.
    grid:    its choices are not searched: each gets an equal share of the trials.
    prior:   where its user expects the optimum, see `_prior`: of a number a value and a deviation, of choices a weight
        for each. Empty where nothing is said.

    Raises:
        SpaceError: the bounds are not finite or not in order, a logarithmic scale reaches 0, no multiple of the step
            lies within the bounds, or whole numbers are not whole.
    """

    path: Path
    low: float
    high: float
    log: bool = False
    step: float | None = None
    integer: bool = False
    normal: bool = False
    choices: Values = ()
    smooth: bool = True
    when: tuple[Condition, ...] = ()
    switch: bool = False
    grid: bool = False
    prior: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for bound in ("low", "high"):  # so that values at a bound are floats, too
            object.__setattr__(self, bound, float(getattr(self, bound)))
        if not (math.isfinite(self.low) and math.isfinite(self.high)):
            raise SpaceError(f"{self.name}: bounds must be finite, got [{self.low}, {self.high}]")
        if not self.low < self.high:
            raise SpaceError(
                f"{self.name}: the lower bound must be below the upper one, got [{self.low}, {self.high}]; "
                "swap them, or make it a constant"
            )
        if self.log and not self.low > 0:
            raise SpaceError(f"{self.name}: a logarithmic scale needs a positive lower bound, got {self.low}")
        if self.step is not None and not self.step > 0:
            raise SpaceError(f"{self.name}: the step must be positive, got {self.step}")
        # 1e-9 of a step, since 0.3 / 0.1 is 2.9999999999999996.
        if self.step is not None and math.ceil(self.low / self.step - 1e-9) * self.step > self.high + 1e-9 * self.step:
            raise SpaceError(f"{self.name}: no multiple of the step {self.step} lies in [{self.low}, {self.high}]")
        if self.integer and not all(float(n).is_integer() for n in (self.low, self.high, self.step or 1)):
            raise SpaceError(f"{self.name}: expected whole numbers, got {self.arguments}")
        if self.choices and (self.low, self.high) != (0, len(self.choices) - 1):
            raise SpaceError(f"{self.name}: {len(self.choices)} choices need the bounds 0 and {len(self.choices) - 1}")

    @classmethod
    def of(cls, path: Path, domain: str, arguments: Sequence[Any]) -> Parameter:
        """From the name of a domain and its arguments.

        Raises:
            SpaceError: there is no such domain, or its arguments are wrong.
        """
        name = named(path)
        if domain == CHOICE:
            return cls.of_choices(path, arguments)
        if domain not in DOMAINS:
            raise SpaceError(f"{name}: unknown domain {domain!r}; choose one of {', '.join([*DOMAINS, CHOICE])}")
        kind = DOMAINS[domain]
        wanted = kind.arguments
        if len(arguments) != len(wanted) or not all(is_finite_number(a) for a in arguments):
            raise SpaceError(f"{name}: {domain} takes [{', '.join(wanted)}], finite numbers, got {list(arguments)}")
        low, high, *step = map(float, arguments)
        if kind.normal:
            if not high > 0:
                raise SpaceError(f"{name}: {domain} needs a positive standard deviation, got {high}")
            # Of a normal distribution `low` and `high` are its mean and deviation up to here.
            low, high = low - TAIL * high, low + TAIL * high
        if kind.integer and step in ([], [1.0]):  # Tune's `high` is exclusive then
            high, step = high - 1, []
        return cls(path, low, high, kind.log, step[0] if step else None, kind.integer, kind.normal)

    @classmethod
    def of_choices(cls, path: Path, choices: Sequence[Any]) -> Parameter:
        """From the values that it may have, at least two.

        Raises:
            SpaceError: there are fewer, or two of them are the same.
        """
        name = named(path)
        values = list(choices)
        if len(values) < 2:
            raise SpaceError(f"{name}: a choice needs at least two values, got {values}; make it a constant")
        if all(is_finite_number(value) for value in values):
            values.sort()
        for number, value in enumerate(values):
            if any(same(value, other) for other in values[:number]):
                raise SpaceError(f"{name}: {value!r} is given twice")
        return cls(path, 0.0, len(values) - 1.0, choices=tuple(values), smooth=False)

    @property
    def domain(self) -> str:
        """The name of its domain."""
        if self.choices:
            return CHOICE
        own = Domain(self.log, self.step is not None, self.integer, self.normal)
        return next(name for name, domain in DOMAINS.items() if domain == own)

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What its domain takes."""
        if self.choices:
            return self.choices
        if self.integer:
            low, high = int(self.low), int(self.high)
            # Without a step Tune's `high` is exclusive, as in `of`.
            return (low, high + 1) if self.step is None else (low, high, int(self.step))
        numbers = (self._mean, self._deviation) if self.normal else (self.low, self.high)
        return numbers if self.step is None else (*numbers, self.step)

    @cached_property
    def name(self) -> str:
        """The path as Tune flattens it: "weight_decay/fc1"."""
        return named(self.path)

    @cached_property
    def unordered(self) -> bool:
        """Whether its values have no order, so that two of them are alike or not, and nothing between."""
        return self.switch or (bool(self.choices) and not all(is_finite_number(value) for value in self.choices))

    @cached_property
    def levels(self) -> tuple[float, ...]:
        """The unit-cube coordinates of its values, where they are few: whole numbers and choices."""
        if self.choices:
            return tuple(self._to_unit(number) for number in range(len(self.choices)))
        if not self.integer:
            return ()
        step = self.step or 1
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        if last - first >= MOST_LEVELS:
            return ()
        return tuple(self._to_unit(number * step) for number in range(first, last + 1))

    @cached_property
    def rest(self) -> float:
        """The unit-cube coordinate that stands for it where it is not active."""
        return self.levels[len(self.levels) // 2] if self.levels else 0.5

    def decode(self, unit: Tensor) -> Any:
        """The value at a unit-cube coordinate, any shape, differentiable; steps are not applied. Whole numbers and
        choices are plain values, of one coordinate."""
        if self.choices or self.integer:
            return self.to_value(unit.item())
        return self.number(unit)

    def number(self, unit: Tensor) -> Tensor:
        """The number at unit-cube coordinates, any shape, differentiable: not rounded. Of a choice it is its number."""
        if self.normal:
            # Quantiles from BELOW to 1 - BELOW: the tails are cut off.
            quantile: Tensor = torch.special.ndtri(BELOW + unit * (1 - 2 * BELOW))
            return self._mean + self._deviation * quantile
        if self.log:
            return torch.exp(math.log(self._low) + unit * self.width)
        return self._low + unit * self.width

    def to_value(self, unit: float) -> Any:
        """The plain value at a unit-cube coordinate, with the step applied."""
        if self.normal:
            number = self.round(self._mean + self._deviation * NORMAL.inv_cdf(BELOW + unit * (1 - 2 * BELOW)))
        else:
            number = self.round(self._low * math.exp(unit * self.width) if self.log else self._low + unit * self.width)
        return self.choices[int(number)] if self.choices else int(number) if self.integer else number

    def encode(self, value: Any) -> float:
        """The unit-cube coordinate of a value, clipped to [0, 1]."""
        if self.choices:
            value = next(number for number, choice in enumerate(self.choices) if same(choice, value))
        return self._to_unit(value)

    def _to_unit(self, number: float) -> float:
        if self.normal:
            unit = (NORMAL.cdf((number - self._mean) / self._deviation) - BELOW) / (1 - 2 * BELOW)
        elif self.log:
            # A value that was given from outside may be below the box, and have no logarithm.
            if not number > 0:
                return 0.0
            unit = math.log(number / self._low) / self.width
        else:
            unit = (number - self._low) / self.width
        return min(1.0, max(0.0, unit))

    @property
    def _mean(self) -> float:
        return (self.low + self.high) / 2

    @property
    def _deviation(self) -> float:
        return (self.high - self.low) / (2 * TAIL)

    # Each whole number has its own interval of the unit cube, those at the ends like the others.

    @property
    def _low(self) -> float:
        return self.low - self._margin

    @property
    def _high(self) -> float:
        return self.high + self._margin

    @property
    def _margin(self) -> float:
        return (self.step or 1) / 2 if self.integer or self.choices else 0.0

    @cached_property
    def width(self) -> float:
        """The length of its interval in search coordinates: logarithms for a logarithmic scale."""
        return math.log(self._high / self._low) if self.log else self._high - self._low

    def slope(self, value: float) -> float:
        """d value / d unit at a value: turns a gradient in the value into one in the unit cube."""
        if self.normal:
            # The derivative of a quantile function is one over the density.
            density = NORMAL.pdf((value - self._mean) / self._deviation)
            return self._deviation * (1 - 2 * BELOW) / density
        return value * self.width if self.log else self.width

    def round(self, value: float) -> float:
        """The nearest multiple of `step` within the bounds; the value, clipped, where there is no step."""
        step = 1 if self.step is None and (self.integer or self.choices) else self.step
        if step is not None:
            multiple = min(round(value / step), math.floor(self.high / step + 1e-9))
            value = max(multiple, math.ceil(self.low / step - 1e-9)) * step
        return min(self.high, max(self.low, value))

    def contains(self, value: Any) -> bool:
        """Whether it may have this value."""
        if self.choices:
            return any(same(choice, value) for choice in self.choices)
        return is_finite_number(value) and self.low <= value <= self.high


def same(one: Any, other: Any) -> bool:
    """Whether two values are the same choice: 1, 1.0 and True are three."""
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):  # a list, where it has been through JSON
        return len(one) == len(other) and all(map(same, one, other))
    if one is other or type(one) is not type(other):
        return one is other
    try:
        return bool(one == other)
    except (ValueError, RuntimeError):  # of arrays and tensors
        return bool((one == other).all())


def is_literal(value: Any) -> bool:
    """Whether Python reads from its text the same value."""
    try:
        return bool(ast.literal_eval(repr(value)) == value)
    except (ValueError, SyntaxError, TypeError):
        return False


def readable(values: Sequence[Any]) -> tuple[Any, ...]:
    """Values, with names in the place of those that are no literals."""
    return tuple(
        value if is_literal(value) else f"<{getattr(value, '__qualname__', type(value).__qualname__)}>"
        for value in values
    )


def is_finite_number(value: Any) -> bool:
    """A truth value is none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
