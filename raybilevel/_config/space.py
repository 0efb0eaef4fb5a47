"""Converts between the `space` of a config and the hyperparameters to search, with the constants around them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raybilevel._parameter import CHOICE, DOMAINS
from raybilevel._space_tree import Choice, Leaf, is_searched, read_tree
from raybilevel._tree import Path, named
from raybilevel.errors import SpaceError
from raybilevel.space import Parameter, Space, nest

EXAMPLE = "{loguniform: [1e-6, 1.0]}"
KNOWN = (*DOMAINS, CHOICE)
LIKE_DOMAINS = ("(", "[", "tune.", *(f"{name}(" for name in KNOWN))
"""Beginnings of texts that were meant as domains."""


def read_space(tree: Mapping[Any, Any]) -> tuple[Space | None, dict[str, Any]]:
    """The space, None if nothing is searched, and the nested constants around it.

    Raises:
        SpaceError: entries are wrong. There is one line for each, with its name.
    """
    mistakes: list[str] = []

    def visit(path: Path, entry: Any) -> Any:
        """An entry without what is written differently in YAML; its mistakes are noted."""
        try:
            if is_domain(named(path), entry):
                ((domain, arguments),) = entry.items()
                if domain == CHOICE and any(map(has_domains, arguments)):
                    return Choice(tuple(visit(path, option) if has_domains(option) else option for option in arguments))
                Parameter.of(path, domain, arguments)
                return Choice(tuple(arguments)) if domain == CHOICE else Leaf(domain, tuple(arguments))
            if isinstance(entry, list) and has_domains(entry):
                return [visit((*path, place), item) if has_domains(item) else item for place, item in enumerate(entry)]
            if not isinstance(entry, Mapping) or not entry:
                check_constant(named(path), entry)
        except SpaceError as error:
            mistakes.append(str(error))
            return entry
        if not isinstance(entry, Mapping):
            return entry
        for key in entry:
            if not isinstance(key, str):
                mistakes.append(f"{named((*path, key))}: the key {key!r} is no text; write it in quotes, '{key}'")
        return {key: visit((*path, key), inner) for key, inner in entry.items()}

    found = {key: visit((key,), entry) for key, entry in tree.items() if isinstance(key, str)}
    mistakes += [f"{key}: the key {key!r} is no text; write it in quotes, '{key}'" for key in tree if key not in found]
    if mistakes:
        raise SpaceError("\n".join(mistakes))
    return read_tree(found) if is_searched(found) else (None, found)


def has_domains(entry: Any) -> bool:
    """Whether a part of a space has a domain in it."""
    if isinstance(entry, Mapping):
        return any(key in KNOWN and isinstance(value, list) for key, value in entry.items()) or any(
            map(has_domains, entry.values())
        )
    return isinstance(entry, list) and any(map(has_domains, entry))


def write_space(space: Space) -> dict[str, Any]:
    """A box as the `space` of a config.

    Raises:
        SpaceError: it is no box, but has lists, alternatives or functions.
    """
    if space.conditional or space.fixed or any(isinstance(key, int) for p in space.parameters for key in p.path):
        raise SpaceError(
            "the problem's own space has lists, alternatives or functions, which are not taken over into a config; "
            "write the hyperparameters to search as its `space` there"
        )
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
    if isinstance(only, str) and isinstance(entry[only], list) and (known or not has_domains(entry[only])):
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
