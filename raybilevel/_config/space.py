"""Converts between the `space` of a config and the hyperparameters to search, with the constants around them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raybilevel._parameter import CHOICE, DOMAINS
from raybilevel.errors import SpaceError
from raybilevel.space import Parameter, Space, nest

Path = tuple[str, ...]

EXAMPLE = "{loguniform: [1e-6, 1.0]}"
KNOWN = (*DOMAINS, CHOICE)
LIKE_DOMAINS = ("(", "[", "tune.", *(f"{name}(" for name in KNOWN))
"""Beginnings of texts that were meant as domains."""


def read_space(tree: Mapping[Any, Any]) -> tuple[tuple[Parameter, ...], dict[str, Any]]:
    """The hyperparameters of a space in their order, and the nested constants around them.

    Raises:
        SpaceError: entries are wrong. There is one line for each, with its name.
    """
    parameters: list[Parameter] = []
    constants: dict[Path, Any] = {}
    mistakes: list[str] = []

    def visit(path: Path, key: Any, entry: Any) -> None:
        path = (*path, str(key))
        try:
            if not isinstance(key, str):
                raise SpaceError(f"{'/'.join(path)}: the key {key!r} is no text; write it in quotes, '{key}'")
            if is_domain("/".join(path), entry):
                ((domain, arguments),) = entry.items()
                parameters.append(Parameter.of(path, domain, arguments))
            elif isinstance(entry, Mapping) and entry:
                for inner_key, inner in entry.items():
                    visit(path, inner_key, inner)
            else:
                check_constant("/".join(path), entry)
                constants[path] = entry
        except SpaceError as error:
            mistakes.append(str(error))

    for key, entry in tree.items():
        visit((), key, entry)
    if mistakes:
        raise SpaceError("\n".join(mistakes))
    return tuple(parameters), nest(constants)


def write_space(space: Space) -> dict[str, Any]:
    """A box as the `space` of a config."""
    return nest({p.path: {p.domain: list(p.arguments)} for p in space.parameters})


def is_domain(name: str, entry: Any) -> bool:
    """Whether an entry is a domain, and not a group of entries or a constant.

    Raises:
        SpaceError: it is neither, but has something of a domain.
    """
    if not isinstance(entry, Mapping):
        return False
    known = [key for key in entry if key in KNOWN]
    only = next(iter(entry)) if len(entry) == 1 else None
    # One key with a list can only be meant as a domain: a list is no constant, and a group has no list of its own.
    if isinstance(only, str) and isinstance(entry[only], list):
        if not known:
            raise SpaceError(
                f"{name}: unknown domain {only!r}; choose one of {', '.join(KNOWN)}, or, where {only!r} is a "
                f"hyperparameter, write {only}: {EXAMPLE}"
            )
        return True
    if known:
        arguments = ("values", "...") if known[0] == CHOICE else DOMAINS[known[0]].arguments
        wanted = f"{{{known[0]}: [{', '.join(arguments)}]}}"
        raise SpaceError(f"{name}: expected {wanted} and nothing beside it, got {dict(entry)}")
    return False


def check_constant(name: str, entry: Any) -> None:
    """Check that an entry is a constant, such as a number or a text.

    Raises:
        SpaceError: it looks like a hyperparameter that was meant to be searched.
    """
    advice = f"to search between two numbers write {EXAMPLE} with your own, else make it an option of the problem"
    if isinstance(entry, list):
        raise SpaceError(f"{name}: {entry} is a list, and no domain; {advice}")
    if isinstance(entry, str) and entry.lstrip().startswith(LIKE_DOMAINS):
        raise SpaceError(f"{name}: {entry!r} is text, and no domain; {advice}")
