"""The box of the upper level: named hyperparameters <-> the unit cube."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from raybilevel._parameter import Parameter, is_finite_number
from raybilevel.errors import SpaceError

__all__ = ["Parameter", "Space", "flatten", "nest"]


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
            # df/du = df/dx dx/du
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


def sobol_points(dimension: int, count: int, seed: int) -> Tensor:
    """Scrambled Sobol points of the unit cube, shape (count, d), in double precision."""
    # torch's engine raises if it is to draw none.
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
        # An empty mapping is an entry like any other, or it would be lost.
        flat.update(flatten(value, path) if isinstance(value, Mapping) and value else {path: value})
    return flat
