"""Search spaces as they are written: nested, with domains, choices between whole parts, and functions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from raybilevel._dependent import Dependent
from raybilevel._parameter import Condition, Parameter
from raybilevel._tree import Path, named, nest
from raybilevel.errors import SpaceError
from raybilevel.space import Fixed, Space


@dataclass(frozen=True)
class Leaf:
    """A domain by its name, and its arguments."""

    domain: str
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Choice:
    """One of several values or parts, in which there may be domains.

    grid: each of them gets an equal share of the trials.
    """

    options: tuple[Any, ...]
    grid: bool = False


@dataclass
class SpaceReader:
    """Reads a tree of dicts, lists, tuples, `Leaf`, `Choice`, `Dependent` and constants, entry by entry.

    A choice between parts that have domains becomes a switch, whose alternatives are entries under conditions. An entry
    that two alternatives have in common, with one domain, is one hyperparameter.

    constants: entries that stand in dicts and are always there. All others are `Fixed`.
    places:    coordinates of the hyperparameters at a path.
    mistakes:  what is wrong with entries, a line each.
    """

    parameters: list[Parameter] = field(default_factory=list)
    fixed: list[Fixed] = field(default_factory=list)
    tuples: set[Path] = field(default_factory=set)
    constants: dict[Path, Any] = field(default_factory=dict)
    places: dict[Path, list[int]] = field(default_factory=dict)
    mistakes: list[str] = field(default_factory=list)

    @property
    def space(self) -> Space:
        """What has been read.

        Raises:
            SpaceError: entries cannot be searched, or there is nothing to search. There is one line for each entry.
        """
        if self.mistakes:
            raise SpaceError("\n".join(self.mistakes))
        if self.constants and not self.parameters:
            given = ", ".join(f"{named(path)} = {value!r}" for path, value in self.constants.items())
            raise SpaceError(
                f"the space has constants only, {given}, and no hyperparameter to search; give at least one, e.g. "
                "tune.loguniform(1e-6, 1.0)"
            )
        constants = nest(self.constants)
        around = constants if any(isinstance(f.value, Dependent) for f in self.fixed) else {}
        return Space(tuple(self.parameters), tuple(self.fixed), frozenset(self.tuples), around)

    def read(self, node: Any, path: Path = (), when: Condition = (), inside: bool = False) -> None:
        """Read a part of the tree, and note what cannot be searched.

        when:   choices that must have been made for it to be there.
        inside: it stands in a list with others that are searched.
        """
        try:
            self._read(node, path, when, inside)
        except SpaceError as error:
            self.mistakes.append(str(error))

    def _read(self, node: Any, path: Path, when: Condition, inside: bool) -> None:
        if isinstance(node, Leaf):
            self.add(Parameter.of(path, node.domain, node.arguments), when)
        elif isinstance(node, Choice):
            self._read_choice(node, path, when)
        elif isinstance(node, Mapping) and node:
            for key, entry in node.items():
                if not isinstance(key, str):
                    self.mistakes.append(f"{named((*path, key))}: the key {key!r} is no text; write {str(key)!r}")
                    continue
                self.read(entry, (*path, key), when, inside)
        elif isinstance(node, list | tuple) and is_searched(node):
            if isinstance(node, tuple):
                self.tuples.add(path)
            for place, entry in enumerate(node):
                self.read(entry, (*path, place), when, inside=True)
        elif when or inside or isinstance(node, Dependent):
            self.fixed.append(Fixed(path, node, (when,) if when else ()))
        else:
            self.constants[path] = node

    def _read_choice(self, node: Choice, path: Path, when: Condition) -> None:
        if node.grid and when:
            raise SpaceError(
                f"{named(path)}: grid_search inside a choice has no equal shares; use tune.choice, or move it out"
            )
        if not any(map(is_searched, node.options)):
            parameter = Parameter.of_choices(path, node.options)
            self.add(replace(parameter, grid=node.grid), when)
            return
        if len(node.options) < 2:
            raise SpaceError(f"{named(path)}: a choice needs at least two values; leave it out around a single one")
        numbers = tuple(range(len(node.options)))
        switch = Parameter(path, 0.0, len(numbers) - 1.0, choices=numbers, smooth=False, switch=True, grid=node.grid)
        coordinate = self.add(switch, when)
        for number, option in enumerate(node.options):
            self.read(option, path, (*when, (coordinate, number)))

    def add(self, parameter: Parameter, when: Condition) -> int:
        """The coordinate of a hyperparameter, under a condition more where it is there already."""
        places = self.places.setdefault(parameter.path, [])
        for coordinate in places:
            other = self.parameters[coordinate]
            if not other.switch and replace(other, when=()) == parameter:
                # No condition, on either side, means that it is always there.
                always = not (other.when and when)
                self.parameters[coordinate] = replace(other, when=() if always else self.shortest((*other.when, when)))
                return coordinate
        places.append(len(self.parameters))
        self.parameters.append(replace(parameter, when=(when,) if when else ()))
        return places[-1]

    def shortest(self, when: tuple[Condition, ...]) -> tuple[Condition, ...]:
        """Fewer conditions that hold where one of these does: where all values of a choice are allowed, it is left out.
        None, if one of them always holds."""
        # A condition that asks for what another one does, and for more, adds nothing.
        when = tuple(c for c in dict.fromkeys(when) if not any(set(other) < set(c) for other in when))
        for condition in when:
            for place, (coordinate, _) in enumerate(condition):
                others = condition[:place], condition[place + 1 :]
                whole = {
                    (*others[0], (coordinate, number), *others[1])
                    for number in range(len(self.parameters[coordinate].levels))
                }
                if whole <= set(when):
                    rest = (*others[0], *others[1])
                    return self.shortest((*(c for c in when if c not in whole), rest)) if rest else ()
        return when


def read_tree(tree: Mapping[str, Any]) -> tuple[Space, dict[str, Any]]:
    """The space of a tree, and the nested constants around it.

    Raises:
        SpaceError: entries cannot be searched, or there is none. There is one line for each.
    """
    reader = SpaceReader()
    for key, node in tree.items():
        # Key by key: an empty tree as a whole would be a constant without a path.
        reader.read({key: node})
    return reader.space, nest(reader.constants)


def is_searched(node: Any) -> bool:
    """Whether a part of a tree has something that differs from trial to trial."""
    if isinstance(node, Leaf | Choice | Dependent):
        return True
    if isinstance(node, Mapping):
        return any(map(is_searched, node.values()))
    return isinstance(node, list | tuple) and any(map(is_searched, node))
