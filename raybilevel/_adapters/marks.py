"""Floats of a config that are found again where a model keeps them, so that tensors can stand in their places."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from raybilevel._tree import Path, leaves, look_up, named, replaced

Value = Callable[[Mapping[str, Any]], Any]
"""What a float is as a function of the hyperparameters, nested as the config is."""
MOST_ENTRIES = 1000
"""Longer collections are data."""
DEEPEST = 60
"""So many references from an object to the next are followed. A layer of a model is two."""


class Held:
    """Something that is kept in a model, and is no part of it."""

    def __init__(self, value: Any) -> None:
        self.value = value


class Attributes:
    """An object of which hyperparameters are looked for among its attributes alone, and not in what these refer to."""

    def __init__(self, value: Any) -> None:
        self.value = value


CLOSED = (
    type, ModuleType, Tensor, Optimizer, Dataset, DataLoader, torch.Generator, str, bytes, int, float, type(None), Held,
)  # fmt: skip
"""What is not searched for hyperparameters."""


class Mark(float):
    """A float of a config, or what is computed of one by + - * / and powers.

    It is pickled and copied as others are, but knows its value as a function of the hyperparameters.
    """

    value: Value

    def __new__(cls, number: float, value: Value) -> Mark:
        made = super().__new__(cls, number)
        made.value = value
        return made

    def __reduce__(self) -> tuple[type[float], tuple[float]]:
        # A checkpoint of a framework is to have plain floats.
        return float, (float(self),)

    def __copy__(self) -> Mark:
        return self

    def __deepcopy__(self, memo: Any) -> Mark:
        return self

    def __neg__(self) -> Mark:
        return Mark(-float(self), lambda given: -self.value(given))


def operation(function: Callable[[Any, Any], Any], turned: bool) -> Callable[[Mark, Any], Any]:
    """An operator of marks; turned: the mark is on its right."""

    def method(self: Mark, other: Any) -> Any:
        if not isinstance(other, int | float):
            return NotImplemented
        value: Value = other.value if isinstance(other, Mark) else lambda given: other

        def combined(given: Mapping[str, Any]) -> Any:
            return function(value(given), self.value(given)) if turned else function(self.value(given), value(given))

        number = function(float(other), float(self)) if turned else function(float(self), float(other))
        # A negative number to a broken power is complex.
        return Mark(number, combined) if isinstance(number, float) else number

    return method


for _name in ("add", "sub", "mul", "truediv", "pow"):
    setattr(Mark, f"__{_name}__", operation(getattr(operator, _name), turned=False))
    setattr(Mark, f"__r{_name}__", operation(getattr(operator, _name), turned=True))


def marked(config: Mapping[str, Any], by_values: Collection[str] = ()) -> dict[str, Any]:
    """A config whose floats are marks, but for those of these names."""
    floats = {
        path: Mark(value, functools.partial(look_up, path=path))
        for path, value in leaves(config).items()
        if isinstance(value, float) and named(path) not in by_values
    }
    found: dict[str, Any] = replaced(plain(config), floats)
    return found


def plain(tree: Any) -> Any:
    """The same in dicts, with numbers in the place of tensors."""
    if isinstance(tree, Mapping):
        return {key: plain(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(map(plain, tree))
    return tree.item() if isinstance(tree, Tensor) else tree


Place = tuple[Callable[[Any], None], Any]
"""How to put something there, and what is there."""


def places_in(roots: Collection[Any]) -> list[Place]:
    """Where there are marks, in these objects and in what they refer to."""
    seen = set[int]()
    return [place for root in roots for place in search(root, seen)]


@contextmanager
def in_place(places: Collection[Place], hyperparameters: Mapping[str, Any]) -> Iterator[list[Tensor]]:
    """Within it marks are replaced by what they are at these hyperparameters. It yields the tensors."""
    tensors: list[Tensor] = []
    try:
        for put, mark in places:
            entry = at(mark, hyperparameters)
            tensors += [part for part in (entry if isinstance(entry, tuple) else (entry,)) if isinstance(part, Tensor)]
            put(entry)
        yield tensors
    finally:
        for put, mark in places:
            put(mark)


def at(mark: Any, hyperparameters: Mapping[str, Any]) -> Any:
    """A mark, or a tuple with marks, at these hyperparameters; anything else as it is."""
    if isinstance(mark, Mark):
        return mark.value(hyperparameters)
    if isinstance(mark, tuple) and has_marks(mark):
        return tuple(at(part, hyperparameters) for part in mark)
    return mark


def has_marks(value: tuple[Any, ...]) -> bool:
    return any(isinstance(part, Mark) or (isinstance(part, tuple) and has_marks(part)) for part in value)


def search(value: Any, seen: set[int], depth: int = 0) -> Iterator[Place]:
    """The places of marks in an object."""
    if id(value) in seen or isinstance(value, CLOSED) or depth > DEEPEST:
        return
    seen.add(id(value))
    for put, part in parts(value):
        if isinstance(part, Mark) or (isinstance(part, tuple) and has_marks(part)):
            yield put, part
        else:
            yield from search(part, seen, depth + 1)


def parts(value: Any) -> Iterator[Place]:
    """What an object consists of."""
    if isinstance(value, dict):
        # Past a __setitem__ of its own, which may check types.
        yield from entries(value, dict.__setitem__)
    elif isinstance(value, list):
        yield from ((functools.partial(value.__setitem__, at), part) for at, part in enumerate(value[:MOST_ENTRIES]))
    elif isinstance(value, tuple | set | frozenset):
        yield from ((refuse, part) for part in list(value)[:MOST_ENTRIES])
    elif isinstance(value, FunctionType):
        yield from ((functools.partial(fill, cell), part) for cell in value.__closure__ or () for part in held(cell))
    elif isinstance(value, MethodType):
        yield refuse, value.__self__
    elif isinstance(value, functools.partial):
        yield from [(refuse, value.func), (refuse, value.args), (refuse, value.keywords)]
    elif isinstance(value, Attributes):
        yield from ((put, part) for put, part in parts(value.value) if isinstance(part, Mark | tuple))
    elif isinstance(attributes := getattr(value, "__dict__", None), dict):
        yield from entries(attributes, dict.__setitem__)


def entries(value: dict[Any, Any], put: Callable[[Any, Any, Any], None]) -> Iterator[Place]:
    if len(value) <= MOST_ENTRIES:
        yield from ((functools.partial(put, value, key), part) for key, part in list(value.items()))


def held(cell: CellType) -> Iterator[Any]:
    try:
        yield cell.cell_contents
    except ValueError:  # it is empty
        return


def fill(cell: CellType, value: Any) -> None:
    cell.cell_contents = value


def refuse(value: Any) -> None:
    """In the place of what cannot be replaced itself."""


def paths_of(config: Mapping[str, Any]) -> list[Path]:
    """Of the tensors in hyperparameters."""
    return [path for path, value in leaves(config).items() if isinstance(value, Tensor)]
