"""The box of the upper level: named hyperparameters <-> the unit cube."""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, PlainSerializer
from torch import Tensor

from raybilevel.errors import SpaceError

__all__ = ["Parameter", "Space", "flatten", "nest"]


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
BELOW = NORMAL.cdf(-TAIL)

Values = Annotated[
    tuple[Any, ...],
    PlainSerializer(repr, return_type=str),
    BeforeValidator(lambda given: ast.literal_eval(given) if isinstance(given, str) else given),
]
"""Numbers, texts, None and tuples of these, written as Python does: JSON would make lists of tuples."""


@dataclass(frozen=True)
class Parameter:
    """One hyperparameter: a number between `low` and `high`, or one of `choices`.

    path:    where it stands in the (nested) config, e.g. ("weight_decay", "fc1").
    low, high: its bounds, both included, in its own unit.
    log:     searched on a logarithmic scale.
    step:    values are multiples of it (Tune's `q`). None allows any value.
    integer: values are whole numbers.
    normal:  coordinates of the unit cube are quantiles of a normal distribution. It is cut off at `low` and `high`,
        `TAIL` standard deviations from its mean.
    choices: its values, if it is no range. `low` and `high` are then 0 and their number less one. Choices that are all
        numbers are in ascending order, and neighbours are alike. Others are equally unlike.
    smooth:  the lower level's loss is differentiable in it, so that it has hypergradients.

    Raises:
        SpaceError: the bounds are not finite or not in order, a logarithmic scale reaches 0, no multiple of the step
            lies within the bounds, or whole numbers are not whole.
    """

    path: tuple[str, ...]
    low: float
    high: float
    log: bool = False
    step: float | None = None
    integer: bool = False
    normal: bool = False
    choices: Values = ()
    smooth: bool = True

    def __post_init__(self) -> None:
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
        if self.step is not None and math.ceil(self.low / self.step - 1e-9) * self.step > self.high + 1e-9 * self.step:
            raise SpaceError(f"{self.name}: no multiple of the step {self.step} lies in [{self.low}, {self.high}]")
        if self.integer and not all(float(n).is_integer() for n in (self.low, self.high, self.step or 1)):
            raise SpaceError(f"{self.name}: expected whole numbers, got {self.arguments}")
        if self.choices and (self.low, self.high) != (0, len(self.choices) - 1):
            raise SpaceError(f"{self.name}: {len(self.choices)} choices need the bounds 0 and {len(self.choices) - 1}")

    @classmethod
    def of(cls, path: tuple[str, ...], domain: str, arguments: Sequence[Any]) -> Parameter:
        """From the name of a domain and its arguments.

        Raises:
            SpaceError: there is no such domain, or its arguments are wrong.
        """
        name = "/".join(path)
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
            low, high = low - TAIL * high, low + TAIL * high
        if kind.integer and step in ([], [1.0]):  # Tune's `high` is exclusive then
            high, step = high - 1, []
        return cls(path, low, high, kind.log, step[0] if step else None, kind.integer, kind.normal)

    @classmethod
    def of_choices(cls, path: tuple[str, ...], choices: Sequence[Any]) -> Parameter:
        """From the values that it may have, at least two.

        Raises:
            SpaceError: there are fewer, or two of them are the same.
        """
        name = "/".join(path)
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
            return (low, high + 1) if self.step is None else (low, high, int(self.step))
        numbers = (self._mean, self._deviation) if self.normal else (self.low, self.high)
        return numbers if self.step is None else (*numbers, self.step)

    @cached_property
    def name(self) -> str:
        """The path as Tune flattens it: "weight_decay/fc1"."""
        return "/".join(self.path)

    @cached_property
    def unordered(self) -> bool:
        """Whether its values have no order, so that two of them are alike or not, and nothing between."""
        return bool(self.choices) and not all(is_finite_number(value) for value in self.choices)

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

    def decode(self, unit: Tensor) -> Any:
        """The value at a unit-cube coordinate, any shape, differentiable; steps are not applied. Whole numbers and
        choices are plain values, of one coordinate."""
        if self.choices or self.integer:
            return self.to_value(unit.item())
        if self.normal:
            return self._mean + self._deviation * torch.special.ndtri(BELOW + unit * (1 - 2 * BELOW))
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
    return type(one) is type(other) and bool(one == other)


@dataclass(frozen=True)
class Space:
    """The box X of the upper level: d coordinates, one `Parameter` each.

    Raises:
        SpaceError: there is no parameter, or two have the same name.
    """

    parameters: tuple[Parameter, ...]

    def __post_init__(self) -> None:
        if not self.parameters:
            raise SpaceError(
                "the space has no hyperparameter to search; give at least one, e.g. tune.loguniform(1e-6, 1.0)"
            )
        names = [parameter.name for parameter in self.parameters]
        for name in names:
            if names.count(name) > 1:
                raise SpaceError(f"{name}: given twice")

    @property
    def dimension(self) -> int:
        """d, the number of hyperparameters."""
        return len(self.parameters)

    @property
    def of_starts(self) -> bool:
        """Whether the upper-level variable is a module, and what is searched here the number of a start; see `STARTS`.

        Else x is a point of this box.
        """
        return self.parameters == STARTS.parameters

    @property
    def names(self) -> tuple[str, ...]:
        """Flat names, in the order of the coordinates."""
        return tuple(parameter.name for parameter in self.parameters)

    @cached_property
    def discrete(self) -> dict[int, tuple[float, ...]]:
        """Coordinates that have a few values only, with those, ascending."""
        return {i: p.levels for i, p in enumerate(self.parameters) if p.levels}

    @cached_property
    def unordered(self) -> tuple[int, ...]:
        """Coordinates of choices without an order."""
        return tuple(i for i, p in enumerate(self.parameters) if p.unordered)

    @cached_property
    def smooth(self) -> tuple[bool, ...]:
        """Of each coordinate, whether the lower level's loss is differentiable in it."""
        return tuple(p.smooth and not p.levels and not p.integer for p in self.parameters)

    def known(self, gradient: Sequence[float]) -> tuple[float, ...]:
        """A gradient, shape (d,), in which entries that mean nothing are NaN: those of coordinates that are not smooth,
        and those that are not finite."""
        return tuple(
            g if smooth and math.isfinite(g) else math.nan for g, smooth in zip(gradient, self.smooth, strict=True)
        )

    def groups(self, smallest: int = 4) -> tuple[tuple[int, ...], ...]:
        """The coordinates of hyperparameters that are of a kind: siblings in the nested space, with equal bounds, scale
        and step, at least `smallest` of them. So `weight_decay: {fc1, fc2, fc3, fc4}` makes a group, and
        hyperparameters at the top level make none."""
        found: dict[Any, list[int]] = {}
        for coordinate, p in enumerate(self.parameters):
            if len(p.path) > 1 and self.smooth[coordinate]:
                found.setdefault((p.path[:-1], p.low, p.high, p.log, p.step), []).append(coordinate)
        return tuple(tuple(group) for group in found.values() if len(group) >= smallest)

    def decode(self, unit: Tensor) -> dict[str, Any]:
        """The nested dict at a point of the unit cube, shape (d,): 0-dimensional tensors, differentiable, and plain
        values where there is no gradient to follow, of whole numbers and choices."""
        return nest({p.path: p.decode(u) for p, u in zip(self.parameters, unit, strict=True)})

    def to_config(self, unit: Tensor) -> dict[str, Any]:
        """The nested dict of plain values at a point of the unit cube, with steps applied."""
        return nest({p.path: p.to_value(u) for p, u in zip(self.parameters, unit.tolist(), strict=True)})

    def encode(self, config: Mapping[str, Any]) -> Tensor:
        """The point of the unit cube, shape (d,), of a nested config; other entries are ignored.

        Raises:
            SpaceError: a hyperparameter is missing, no finite number, or none of its choices.
        """
        return torch.tensor([p.encode(self.value(config, p)) for p in self.parameters], dtype=torch.double)

    def contains(self, config: Mapping[str, Any]) -> bool:
        """Whether a nested config lies within the bounds.

        Raises:
            SpaceError: as `encode`.
        """
        return all(p.contains(self.value(config, p)) for p in self.parameters)

    def to_unit_gradient(self, config: Mapping[str, Any], gradient: Mapping[str, float]) -> Tensor:
        """A gradient by flat name in the hyperparameters' own units -> shape (d,) in the unit cube; NaN where `known`
        says so."""
        entries = [
            gradient[p.name] * p.slope(self.value(config, p)) if smooth else math.nan
            for p, smooth in zip(self.parameters, self.smooth, strict=True)
        ]
        return torch.tensor(self.known(entries), dtype=torch.double)

    @staticmethod
    def value(config: Mapping[str, Any], parameter: Parameter) -> Any:
        """One hyperparameter's value in a nested config."""
        entry: Any = config
        for key in parameter.path:
            if not isinstance(entry, Mapping) or key not in entry:
                raise SpaceError(f"{parameter.name}: missing from the configuration {dict(config)}")
            entry = entry[key]
        if parameter.choices:
            if not parameter.contains(entry):
                allowed = ", ".join(map(repr, parameter.choices))
                raise SpaceError(f"{parameter.name}: expected one of {allowed}, got {entry!r}")
            return entry
        if not is_finite_number(entry):
            raise SpaceError(f"{parameter.name}: expected a finite number, got {entry!r}")
        return float(entry)


STARTS = Space((Parameter(("start",), 0.0, 65535.0, step=1.0),))
"""What is searched where the upper level is a module (`LargeUpperLevel.upper_variables`): the number of a descent's
start, from which its seed follows."""


def check_points(points: Sequence[Mapping[str, Any]], space: Space, name: str = "points_to_evaluate") -> None:
    """Points name every hyperparameter of the space, nested as it is, within its bounds.

    Raises:
        SpaceError: one does not; it is named by its number.
    """
    for number, point in enumerate(points):
        unknown = {"/".join(path) for path in flatten(point)} - set(space.names)
        if unknown:
            raise SpaceError(
                f"{name}[{number}]: {', '.join(sorted(unknown))} not in the space, which has {', '.join(space.names)}"
            )
        for parameter in space.parameters:
            try:
                value = space.value(point, parameter)
            except SpaceError as error:
                raise SpaceError(f"{name}[{number}]: {error}") from error
            if not parameter.contains(value):
                raise SpaceError(
                    f"{name}[{number}]: {parameter.name} = {value} is outside [{parameter.low}, {parameter.high}]"
                )


def is_finite_number(value: Any) -> bool:
    """A truth value is none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def sobol_points(dimension: int, count: int, seed: int) -> Tensor:
    """Scrambled Sobol points of the unit cube, shape (count, d), in double precision."""
    if count == 0:
        return torch.empty(0, dimension, dtype=torch.double)
    points: Tensor = torch.quasirandom.SobolEngine(dimension, scramble=True, seed=seed).draw(count, dtype=torch.double)
    return points


def nest(flat: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """{("a", "b"): 1} -> {"a": {"b": 1}}."""
    root: dict[str, Any] = {}
    for path, value in flat.items():
        node = root
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = value
    return root


def flatten(tree: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """{"a": {"b": 1}} -> {("a", "b"): 1}."""
    flat: dict[tuple[str, ...], Any] = {}
    for key, value in tree.items():
        path = (*prefix, str(key))
        flat.update(flatten(value, path) if isinstance(value, Mapping) and value else {path: value})
    return flat
