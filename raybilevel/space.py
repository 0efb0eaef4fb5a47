"""The box of the upper level: named hyperparameters <-> the unit cube."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from raybilevel._dependent import Dependent, resolved
from raybilevel._parameter import Condition, Parameter, is_finite_number, same
from raybilevel._prior import given_priors, log_density, mode, quantiles
from raybilevel._tree import MISSING, Path, flatten, leaves, look_up, nest, nest_lists, replaced
from raybilevel.errors import SpaceError

__all__ = ["Fixed", "Parameter", "Space", "flatten", "nest", "with_priors"]


@dataclass(frozen=True)
class Fixed:
    """An entry of the config that is not searched: it is a `Dependent`, or it stands in a list with others that are
    searched, or in a part of the config that is not always there.

    when: as of a `Parameter`.
    """

    path: Path
    value: Any = field(compare=False)
    when: tuple[Condition, ...] = ()


@dataclass(frozen=True)
class Space:
    """The box X of the upper level: d coordinates, one `Parameter` each.

    Some may be active under conditions only (`Parameter.when`). Where one is not, its coordinate is `Parameter.rest`,
    so that points which differ in nothing that is active are equal.

    fixed:  other entries of the configs of its points.
    tuples: paths at which these have a tuple, and not a list.
    around: constants around it that functions of `fixed` are given.

    Raises:
        SpaceError: there is no parameter, or two have the same name and are always active.
    """

    parameters: tuple[Parameter, ...]
    fixed: tuple[Fixed, ...] = ()
    tuples: frozenset[Path] = frozenset()
    around: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not self.parameters:
            raise SpaceError(
                "the space has no hyperparameter to search; give at least one, e.g. tune.loguniform(1e-6, 1.0)"
            )
        names = [parameter.name for parameter in self.parameters if not parameter.when]
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
    def grid(self) -> tuple[int, ...]:
        """Coordinates of which each value gets an equal share of the trials, as each combination of theirs does."""
        return tuple(i for i, p in enumerate(self.parameters) if p.grid)

    @property
    def cells(self) -> int:
        """How many combinations of the values of the grid there are; 1 without a grid."""
        return math.prod(len(self.discrete[coordinate]) for coordinate in self.grid)

    def next_cell(self, before: Sequence[Sequence[float]]) -> dict[int, float]:
        """Of the cells of the grid that have had the fewest of these points the first: coordinates and their values."""
        cells = list(itertools.product(*(range(len(self.discrete[c])) for c in self.grid)))
        counts = Counter(self._cell(unit) for unit in before)
        least = min(cells, key=lambda cell: counts[cell])
        return {c: self.discrete[c][number] for c, number in zip(self.grid, least, strict=True)}

    def in_cell(self, unit: Tensor, before: Sequence[Sequence[float]]) -> Tensor:
        """The point, shape (d,), if its cell of the grid has had no more of those before than another; else it is moved
        to one that has had the fewest."""
        cell = self.next_cell(before)
        counts = Counter(self._cell(other) for other in before)
        # Of the other point only coordinates of the grid are looked at.
        if counts[self._cell(unit.tolist())] == counts[self._cell([cell.get(i, 0.0) for i in range(self.dimension)])]:
            return unit
        moved = unit.clone()
        for coordinate, value in cell.items():
            moved[coordinate] = value
        return moved

    def _cell(self, unit: Sequence[float]) -> tuple[int, ...]:
        return tuple(nearest(self.discrete[c], unit[c]) for c in self.grid)

    @cached_property
    def smooth(self) -> tuple[bool, ...]:
        """Of each coordinate, whether the lower level's loss is differentiable in it."""
        return tuple(p.smooth and not p.levels and not p.integer for p in self.parameters)

    @cached_property
    def has_priors(self) -> bool:
        """Whether the user has said of a hyperparameter where its optimum is expected."""
        return any(p.prior for p in self.parameters)

    def log_prior(self, unit: Tensor) -> Tensor:
        """The logarithm of the density of the optimum that the user expects, shape (..., d) -> (...), differentiable;
        0 at its largest. Coordinates that are not active, or have no prior, do not count."""
        active = self.active(unit)
        found = unit.new_zeros(unit.shape[:-1])
        for coordinate, p in enumerate(self.parameters):
            if p.prior:
                found = found + torch.where(active[..., coordinate], log_density(p, unit[..., coordinate]), 0.0)
        return found

    def expected(self, points: Tensor) -> Tensor:
        """A design, shape (n, d), with half of its points moved to where the optimum is expected: the first to the mode
        of the prior, every second one of the others to its quantiles. The rest stays, for a prior that is wrong."""
        moved = points.clone()
        for coordinate, p in enumerate(self.parameters):
            if p.prior:
                moved[1::2, coordinate] = quantiles(p, points[1::2, coordinate])
                moved[0, coordinate] = mode(p)
        return moved

    @cached_property
    def conditional(self) -> bool:
        """Whether some hyperparameters are not always active."""
        return any(p.when for p in self.parameters)

    def active(self, unit: Tensor) -> Tensor:
        """Of each coordinate of points of the unit cube, shape (..., d), whether it is active there: booleans."""
        found = torch.ones_like(unit, dtype=torch.bool)
        for coordinate, p in enumerate(self.parameters):
            if p.when:
                found[..., coordinate] = torch.stack([self._holds(c, unit) for c in p.when]).any(0)
        return found

    def _holds(self, condition: Condition, unit: Tensor) -> Tensor:
        found = torch.ones_like(unit[..., 0], dtype=torch.bool)
        for coordinate, number in condition:
            levels = torch.tensor(self.discrete[coordinate], dtype=unit.dtype, device=unit.device)
            found &= (unit[..., coordinate, None] - levels).abs().argmin(-1) == number
        return found

    def at_rest(self, unit: Tensor) -> tuple[Tensor, Tensor]:
        """Points of the unit cube, shape (..., d), with every coordinate that is not active at its rest; and which
        these are, booleans of that shape."""
        active = self.active(unit)
        rest = torch.tensor([p.rest for p in self.parameters], dtype=unit.dtype, device=unit.device)
        return torch.where(active, unit, rest), ~active

    def rounded(self, unit: Tensor) -> Tensor:
        """The point that a training at this one has, shape (d,): with steps applied, and at rest."""
        unit, _ = self.at_rest(unit)
        entries = [p.encode(p.to_value(u)) for p, u in zip(self.parameters, unit.tolist(), strict=True)]
        # Once more, as a step moves coordinates at rest, too.
        return self.at_rest(torch.tensor(entries, dtype=torch.double))[0]

    def representatives(self) -> list[Tensor]:
        """The centre of the unit cube, and points at which conditions hold that do not hold there: at one of these
        points each hyperparameter is active, and each part of the config is there."""
        centre = self.rounded(torch.full((self.dimension,), 0.5, dtype=torch.double))
        found = [centre]
        for condition in dict.fromkeys(itertools.chain.from_iterable(self._conditions)):
            if any(self._holds(condition, point) for point in found):
                continue
            point = centre.clone()
            for coordinate, number in condition:
                point[coordinate] = self.discrete[coordinate][number]
            found.append(self.rounded(point))
        return found

    def known(self, gradient: Sequence[float], unit: Tensor | None = None) -> tuple[float, ...]:
        """A gradient, shape (d,), in which entries that mean nothing are NaN: those of coordinates that are not smooth,
        or not active at this point, and those that are not finite."""
        active = [True] * self.dimension if unit is None else self.active(unit).tolist()
        return tuple(
            g if smooth and there and math.isfinite(g) else math.nan
            for g, smooth, there in zip(gradient, self.smooth, active, strict=True)
        )

    def groups(self, smallest: int = 4) -> tuple[tuple[int, ...], ...]:
        """The coordinates of hyperparameters that are of a kind: siblings in the nested space, with equal bounds, scale
        and step, at least `smallest` of them. So `weight_decay: {fc1, fc2, fc3, fc4}` makes a group, and
        hyperparameters at the top level make none."""
        found: dict[Any, list[int]] = {}
        for coordinate, p in enumerate(self.parameters):
            if len(p.path) > 1 and self.smooth[coordinate] and not p.when:
                found.setdefault((p.path[:-1], p.low, p.high, p.log, p.step), []).append(coordinate)
        return tuple(tuple(group) for group in found.values() if len(group) >= smallest)

    def decode(self, unit: Tensor) -> dict[str, Any]:
        """The config at a point of the unit cube, shape (d,): 0-dimensional tensors, differentiable, and plain values
        where there is no gradient to follow, of whole numbers and choices."""
        decoded = {p.path: p.decode(unit[coordinate]) for coordinate, p in self._active_parameters(unit)}
        if not self.fixed:
            return self._nested(decoded)
        # Functions of the config are given plain values, as in a training. There is no gradient through them.
        found: dict[str, Any] = replaced(self.to_config(unit.detach().cpu().double()), decoded)
        return found

    def to_config(self, unit: Tensor) -> dict[str, Any]:
        """The config of plain values at a point of the unit cube, with steps applied."""
        entries = unit.tolist()
        searched = {p.path: p.to_value(entries[coordinate]) for coordinate, p in self._active_parameters(unit)}
        fixed = {f.path: f.value for f in self.fixed if not f.when or any(self._holds(c, unit) for c in f.when)}
        found = self._nested({**fixed, **searched})
        return resolved(found, self.around) if fixed else found

    def _nested(self, entries: Mapping[Path, Any]) -> dict[str, Any]:
        return nest_lists(entries, self.tuples) if self._has_lists else nest(entries)

    def _active_parameters(self, unit: Tensor) -> list[tuple[int, Parameter]]:
        """Those with an entry in the config at a point, shape (d,), and their coordinates."""
        active = self.active(unit).tolist() if self.conditional else [True] * self.dimension
        return [(i, p) for i, p in enumerate(self.parameters) if active[i] and not p.switch]

    @cached_property
    def _has_lists(self) -> bool:
        paths = [p.path for p in self.parameters] + [f.path for f in self.fixed]
        return any(isinstance(key, int) for path in paths for key in path)

    def encode(self, config: Mapping[str, Any]) -> Tensor:
        """The point of the unit cube, shape (d,), of a config; other entries are ignored.

        Raises:
            SpaceError: a hyperparameter is missing, no finite number, or none of its choices.
        """
        values = self.values(config)
        entries = [values.get(i, p.rest) if p.switch else p.encode(values[i]) if i in values else p.rest
                   for i, p in enumerate(self.parameters)]  # fmt: skip
        return torch.tensor(entries, dtype=torch.double)

    def contains(self, config: Mapping[str, Any]) -> bool:
        """Whether a config lies within the bounds.

        Raises:
            SpaceError: as `encode`.
        """
        values = self.values(config)
        return all(p.switch or p.contains(values[i]) for i, p in enumerate(self.parameters) if i in values)

    def part(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """What a config has of the active hyperparameters, as they are.

        Raises:
            SpaceError: as `encode`.
        """
        found = {self.parameters[i].path: v for i, v in self.values(config).items() if not self.parameters[i].switch}
        return self._nested(found)

    def to_unit_gradient(
        self, config: Mapping[str, Any], gradient: Mapping[str, float], unit: Tensor | None = None
    ) -> Tensor:
        """A gradient by flat name in the hyperparameters' own units -> shape (d,) in the unit cube; NaN where `known`
        says so.

        unit: the point of the config, shape (d,), where it is known. The config alone does not tell alternatives apart
            that it fits both.
        """
        if unit is None:
            values = self.values(config)
        else:
            values = {coordinate: self.value(config, p) for coordinate, p in self._active_parameters(unit)}
        entries = [
            # df/du = df/dx dx/du
            gradient[p.name] * p.slope(values[i]) if smooth and i in values else math.nan
            for i, (p, smooth) in enumerate(zip(self.parameters, self.smooth, strict=True))
        ]
        return torch.tensor(self.known(entries), dtype=torch.double)

    def values(self, config: Mapping[str, Any]) -> dict[int, Any]:
        """The value of every active hyperparameter in a config, by coordinate; of a switch, its coordinate's.

        Raises:
            SpaceError: as `encode`.
        """
        chosen: dict[int, int] = {}
        found: dict[int, Any] = {}
        before = -1
        # A condition may be of a choice that comes later: until nothing new is active.
        while len(found) > before:
            before = len(found)
            for coordinate, p in enumerate(self.parameters):
                if coordinate in found or not is_met(p.when, chosen):
                    continue
                if p.switch:
                    chosen[coordinate] = self._alternative(config, coordinate, chosen)
                    found[coordinate] = p.levels[chosen[coordinate]]
                    continue
                found[coordinate] = self.value(config, p)
                if coordinate in self._deciding:
                    chosen[coordinate] = nearest(p.levels, p.encode(found[coordinate]))
        return dict(sorted(found.items()))

    @cached_property
    def _deciding(self) -> frozenset[int]:
        """Coordinates on which others depend."""
        return frozenset(c for when in self._conditions for condition in when for c, _ in condition)

    @property
    def _conditions(self) -> list[tuple[Condition, ...]]:
        return [p.when for p in self.parameters] + [f.when for f in self.fixed]

    def _alternative(self, config: Mapping[str, Any], switch: int, chosen: Mapping[int, int]) -> int:
        """Which of its alternatives a switch has in a config: of those that agree with it, the one of the most entries.

        Raises:
            SpaceError: none agrees.
        """
        p = self.parameters[switch]
        agreeing: dict[int, int] = {}
        for number in range(len(p.choices)):
            then = {**chosen, switch: number}
            met = [q for q in self.parameters if asks_for(q.when, switch) and is_met(q.when, then)]
            constants = [f for f in self.fixed if asks_for(f.when, switch) and is_met(f.when, then)]
            searched = [(q, look_up(config, q.path)) for q in met]
            fixed = [(f, entry) for f in constants if (entry := look_up(config, f.path)) is not MISSING]
            # An alternative of which the config has nothing would agree, since `all` of no entries is true.
            if constants and not (searched or fixed):
                continue
            if all(entry is not MISSING and (q.switch or q.contains(entry)) for q, entry in searched) and all(
                isinstance(f.value, Dependent) or same(f.value, entry) for f, entry in fixed
            ):
                agreeing[number] = len(searched) + len(fixed)
        if not agreeing:
            found = look_up(config, p.path)
            shown = "nothing" if found is MISSING else repr(found)
            raise SpaceError(f"{p.name}: expected one of its {len(p.choices)} alternatives, got {shown}")
        return max(agreeing, key=lambda number: agreeing[number])

    @staticmethod
    def value(config: Mapping[str, Any], parameter: Parameter) -> Any:
        """One hyperparameter's value in a config."""
        entry = look_up(config, parameter.path)
        if entry is MISSING:
            raise SpaceError(f"{parameter.name}: missing from the configuration {dict(config)}")
        if parameter.choices:
            if not parameter.contains(entry):
                allowed = ", ".join(map(repr, parameter.choices))
                raise SpaceError(f"{parameter.name}: expected one of {allowed}, got {entry!r}")
            return entry
        if not is_finite_number(entry):
            raise SpaceError(f"{parameter.name}: expected a finite number, got {entry!r}")
        return float(entry)


def with_priors(space: Space, priors: Mapping[str, Any]) -> Space:
    """The space with what the user expects of the optimum, as `BilevelSearch` takes it.

    priors: nested like the space. Of a number a value and a standard deviation, in decades on a logarithmic scale and
        else in its own unit. Of a choice a weight for each of its values. An entry at a group holds for all in it.

    Raises:
        SpaceError: an entry is none of these, or belongs to no hyperparameter.
    """
    return replace(space, parameters=given_priors(space.parameters, priors)) if priors else space


def is_met(when: Sequence[Condition], chosen: Mapping[int, int]) -> bool:
    """Whether one of these conditions holds, or there is none. chosen: the number of each choice's value."""
    return not when or any(all(chosen.get(c) == number for c, number in condition) for condition in when)


def asks_for(when: Sequence[Condition], coordinate: int) -> bool:
    """Whether a choice is part of a condition."""
    return any(c == coordinate for condition in when for c, _ in condition)


def nearest(levels: Sequence[float], unit: float) -> int:
    return min(range(len(levels)), key=lambda number: abs(levels[number] - unit))


STARTS = Space((Parameter(("start",), 0.0, 65535.0, step=1.0),))
"""What is searched where the upper level is a module (`LargeUpperLevel.upper_variables`): the number of a descent's
start, from which its seed follows."""


def check_points(points: Sequence[Mapping[str, Any]], space: Space, name: str = "points_to_evaluate") -> None:
    """Points name every hyperparameter of the space, nested as it is, within its bounds.

    Raises:
        SpaceError: one does not; it is named by its number.
    """
    searched = [p for p in space.parameters if not p.switch]
    paths = {keys(path) for path in [p.path for p in searched] + [f.path for f in space.fixed]}
    wholes = {keys(p.path) for p in searched if p.choices}  # whose values may have parts, too
    wholes |= {keys(f.path) for f in space.fixed if isinstance(f.value, Mapping | list | tuple | Dependent)}
    if isinstance(points, Mapping) or not all(isinstance(point, Mapping) for point in points):
        raise SpaceError(f"{name}: expected a list of dicts, nested like the space, got {points!r}")
    for number, point in enumerate(points):
        given = [keys(path) for path in leaves(point) if path]
        unknown = [
            "/".join(path) for path in given
            if path not in paths and not any(path[:length] in wholes for length in range(1, len(path)))
        ]  # fmt: skip
        if unknown:
            raise SpaceError(
                f"{name}[{number}]: {', '.join(sorted(unknown))} not in the space, which has {', '.join(space.names)}"
            )
        check_values(point, space, f"{name}[{number}]")


def check_values(config: Mapping[str, Any], space: Space, name: str) -> None:
    """A config has every hyperparameter of the space, within its bounds. Other entries are ignored.

    Raises:
        SpaceError: it has not; it is named.
    """
    try:
        values = space.values(config)
    except SpaceError as error:
        raise SpaceError(f"{name}: {error}") from error
    for coordinate, value in values.items():
        parameter = space.parameters[coordinate]
        if not parameter.switch and not parameter.contains(value):
            raise SpaceError(f"{name}: {parameter.name} = {value} is outside [{parameter.low}, {parameter.high}]")


def keys(path: Path) -> tuple[str, ...]:
    return tuple(map(str, path))


def sobol_points(dimension: int, count: int, seed: int) -> Tensor:
    """Scrambled Sobol points of the unit cube, shape (count, d), in double precision."""
    # torch's engine raises if it is to draw none.
    if count == 0:
        return torch.empty(0, dimension, dtype=torch.double)
    points: Tensor = torch.quasirandom.SobolEngine(dimension, scramble=True, seed=seed).draw(count, dtype=torch.double)
    return points
