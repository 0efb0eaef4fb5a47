"""The box of the upper level: named hyperparameters <-> the unit cube."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from raybilevel.errors import SpaceError

__all__ = ["Parameter", "Space", "flatten", "nest"]


@dataclass(frozen=True)
class Domain:
    """How a hyperparameter is searched.

    log:     on a logarithmic scale.
    stepped: in multiples of a step.
    """

    log: bool
    stepped: bool

    @property
    def arguments(self) -> tuple[str, ...]:
        """What it takes, in order."""
        return ("low", "high", "step") if self.stepped else ("low", "high")


DOMAINS: dict[str, Domain] = {
    "uniform": Domain(log=False, stepped=False),
    "loguniform": Domain(log=True, stepped=False),
    "quniform": Domain(log=False, stepped=True),
    "qloguniform": Domain(log=True, stepped=True),
}
"""The domains by the names that they have in config files and in Ray Tune."""


@dataclass(frozen=True)
class Parameter:
    """One continuous hyperparameter, searched between `low` and `high`.

    path: where it stands in the (nested) config, e.g. ("weight_decay", "fc1").
    low, high: its bounds, both included, in its own unit.
    log:  searched on a logarithmic scale.
    step: suggestions are multiples of it (Tune's `q`). None allows any value.

    Raises:
        SpaceError: the bounds are not finite or not in order, a logarithmic scale reaches 0, or no multiple of the step
            lies within the bounds.
    """

    path: tuple[str, ...]
    low: float
    high: float
    log: bool = False
    step: float | None = None

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

    @classmethod
    def of(cls, path: tuple[str, ...], domain: str, arguments: Sequence[float]) -> Parameter:
        """From the name of a domain and its arguments.

        Raises:
            SpaceError: there is no such domain, or its arguments are wrong.
        """
        name = "/".join(path)
        if domain not in DOMAINS:
            raise SpaceError(f"{name}: unknown domain {domain!r}; choose one of {', '.join(DOMAINS)}")
        wanted = DOMAINS[domain].arguments
        if len(arguments) != len(wanted) or not all(is_finite_number(a) for a in arguments):
            raise SpaceError(f"{name}: {domain} takes [{', '.join(wanted)}], finite numbers, got {list(arguments)}")
        low, high, *step = map(float, arguments)
        return cls(path, low, high, DOMAINS[domain].log, step[0] if step else None)

    @property
    def domain(self) -> str:
        """The name of its domain."""
        own = Domain(self.log, self.step is not None)
        return next(name for name, domain in DOMAINS.items() if domain == own)

    @property
    def arguments(self) -> tuple[float, ...]:
        """What its domain takes."""
        return (self.low, self.high) if self.step is None else (self.low, self.high, self.step)

    @cached_property
    def name(self) -> str:
        """The path as Tune flattens it: "weight_decay/fc1"."""
        return "/".join(self.path)

    def decode(self, unit: Tensor) -> Tensor:
        """The value at a unit-cube coordinate, differentiable, any shape; steps are not applied."""
        if self.log:
            return torch.exp(math.log(self.low) + unit * self.width)
        return self.low + unit * self.width

    def to_value(self, unit: float) -> float:
        """The plain value at a unit-cube coordinate, with the step applied."""
        return self.round(self.low * math.exp(unit * self.width) if self.log else self.low + unit * self.width)

    def encode(self, value: float) -> float:
        """The unit-cube coordinate of a value, clipped to [0, 1]."""
        if self.log:
            if not value > 0:
                return 0.0
            unit = math.log(value / self.low) / self.width
        else:
            unit = (value - self.low) / self.width
        return min(1.0, max(0.0, unit))

    @property
    def width(self) -> float:
        """The length of its interval in search coordinates: logarithms for a logarithmic scale."""
        return math.log(self.high / self.low) if self.log else self.high - self.low

    def slope(self, value: float) -> float:
        """d value / d unit at a value: turns a gradient in the value into one in the unit cube."""
        return value * self.width if self.log else self.width

    def round(self, value: float) -> float:
        """The nearest multiple of `step` within the bounds; the value, clipped, where there is no step."""
        if self.step is not None:
            multiple = min(round(value / self.step), math.floor(self.high / self.step + 1e-9))
            value = max(multiple, math.ceil(self.low / self.step - 1e-9)) * self.step
        return min(self.high, max(self.low, value))


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

    def groups(self, smallest: int = 4) -> tuple[tuple[int, ...], ...]:
        """The coordinates of hyperparameters that are of a kind: siblings in the nested space, with equal bounds, scale
        and step, at least `smallest` of them. So `weight_decay: {fc1, fc2, fc3, fc4}` makes a group, and
        hyperparameters at the top level make none."""
        found: dict[Any, list[int]] = {}
        for coordinate, p in enumerate(self.parameters):
            if len(p.path) > 1:
                found.setdefault((p.path[:-1], p.low, p.high, p.log, p.step), []).append(coordinate)
        return tuple(tuple(group) for group in found.values() if len(group) >= smallest)

    def decode(self, unit: Tensor) -> dict[str, Any]:
        """The nested dict of 0-dimensional tensors at a point of the unit cube, shape (d,); differentiable."""
        return nest({p.path: p.decode(u) for p, u in zip(self.parameters, unit, strict=True)})

    def to_config(self, unit: Tensor) -> dict[str, Any]:
        """The nested dict of plain floats at a point of the unit cube, with steps applied."""
        return nest({p.path: p.to_value(u) for p, u in zip(self.parameters, unit.tolist(), strict=True)})

    def encode(self, config: Mapping[str, Any]) -> Tensor:
        """The point of the unit cube, shape (d,), of a nested config; other entries are ignored.

        Raises:
            SpaceError: a hyperparameter is missing or not a finite number.
        """
        return torch.tensor([p.encode(self.value(config, p)) for p in self.parameters], dtype=torch.double)

    def contains(self, config: Mapping[str, Any]) -> bool:
        """Whether a nested config lies within the bounds.

        Raises:
            SpaceError: as `encode`.
        """
        return all(p.low <= self.value(config, p) <= p.high for p in self.parameters)

    def to_unit_gradient(self, config: Mapping[str, Any], gradient: Mapping[str, float]) -> Tensor:
        """A gradient by flat name in the hyperparameters' own units -> shape (d,) in the unit cube."""
        return torch.tensor(
            [gradient[p.name] * p.slope(self.value(config, p)) for p in self.parameters], dtype=torch.double
        )

    @staticmethod
    def value(config: Mapping[str, Any], parameter: Parameter) -> float:
        """One hyperparameter's value in a nested config."""
        entry: Any = config
        for key in parameter.path:
            if not isinstance(entry, Mapping) or key not in entry:
                raise SpaceError(f"{parameter.name}: missing from the configuration {dict(config)}")
            entry = entry[key]
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
            if not parameter.low <= value <= parameter.high:
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
