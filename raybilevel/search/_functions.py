"""What the functions of a space make their values of, found by calling them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from raybilevel._dependent import Dependent, seeded
from raybilevel._tree import MISSING, Path, look_up, replaced
from raybilevel.search._calls import Given
from raybilevel.space import Parameter, Space, flatten, nest

ConfigFunction = Callable[[Mapping[str, Any]], Any]
ELSEWHERE = (0.05, 0.4, 0.95)
"""Unit-cube coordinates at which it is tried whether a function follows a hyperparameter."""


def read_by_functions(space: Space, constants: Mapping[str, Any]) -> set[Path]:
    """What the functions of a space read of its configs, and more: some go through all entries for a few."""
    read = set[Path]()
    for config, functions in with_functions(space, constants):
        given = Given(config, read=read)
        for function in functions:
            called(function, given)
    return read


def followed_by_functions(space: Space, constants: Mapping[str, Any]) -> set[Path]:
    """The floats of a space that change what its functions make of a config."""
    followed = set[Path]()
    floats = [p for p in space.parameters if not p.choices and not p.integer]
    for config, functions in with_functions(space, constants):
        for function in functions:
            left = [p for p in floats if p.path not in followed and look_up(config, p.path) is not MISSING]
            if left and follows(function, config, left):
                followed |= {p.path for p in left if follows(function, config, [p])}
    return followed


def follows(function: ConfigFunction, config: dict[str, Any], parameters: Sequence[Parameter]) -> bool:
    """Whether a function of configs gives something else where hyperparameters have other values."""
    before = called(function, config)
    for unit in ELSEWHERE:
        try:
            after = called(function, replaced(config, {p.path: p.to_value(unit) for p in parameters}))
        except Exception:  # whatever a user's function raises: it does look at the values
            return True
        if repr(after) != repr(before):
            return True
    return False


def called(function: ConfigFunction, config: Mapping[str, Any]) -> Any:
    with seeded(""):
        return function(config)


def with_functions(space: Space, constants: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], list[ConfigFunction]]]:
    """Configs that have every part of a space, each with the functions of it that are there."""
    functions = {f.path: f.value.function for f in space.fixed if isinstance(f.value, Dependent)}
    for point in space.representatives() if functions else ():
        searched = space.to_config(point)
        there = [function for path, function in functions.items() if look_up(searched, path) is not MISSING]
        yield nest({**flatten(constants), **flatten(searched)}), there
