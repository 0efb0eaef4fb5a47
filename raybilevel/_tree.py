"""Configs as trees: dicts, lists and tuples, and the paths of what stands in them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Path = tuple[str | int, ...]
"""Keys of dicts and places in lists, from the outside in."""
MISSING: Any = object()


def named(path: Path) -> str:
    """As Tune writes it: ("layers", 0, "width") -> "layers/0/width"."""
    return "/".join(map(str, path))


def nest(flat: Mapping[Any, Any]) -> dict[str, Any]:
    """{("a", "b"): 1} -> {"a": {"b": 1}}."""
    root: dict[Any, Any] = {}
    for path, value in flat.items():
        node = root
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = value
    return root


def flatten(tree: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """{"a": {"b": 1}} -> {("a", "b"): 1}. Lists are values."""
    flat: dict[tuple[str, ...], Any] = {}
    for key, value in tree.items():
        path = (*prefix, str(key))
        # An empty mapping is an entry like any other, or it would be lost.
        flat.update(flatten(value, path) if isinstance(value, Mapping) and value else {path: value})
    return flat


def leaves(tree: Any, prefix: Path = ()) -> dict[Path, Any]:
    """{"a": [1, {"b": 2}]} -> {("a", 0): 1, ("a", 1, "b"): 2}."""
    if isinstance(tree, Mapping) and tree:
        entries = [((*prefix, key), value) for key, value in tree.items()]
    elif isinstance(tree, list | tuple) and tree:
        entries = [((*prefix, place), value) for place, value in enumerate(tree)]
    else:
        return {prefix: tree}
    return {path: leaf for inner, value in entries for path, leaf in leaves(value, inner).items()}


def replaced(tree: Any, values: Mapping[Path, Any]) -> Any:
    """The same tree with other values at these paths. What holds none of them is the same object."""
    touched = {path[:length] for path in values for length in range(len(path) + 1)}

    def visit(node: Any, path: Path) -> Any:
        if path in values or path not in touched:
            return values.get(path, node)
        if isinstance(node, Mapping):
            return {key: visit(value, (*path, key)) for key, value in node.items()}
        items = [visit(value, (*path, place)) for place, value in enumerate(node)]
        return items if isinstance(node, list) else tuple(items)

    return visit(tree, ())


def look_up(tree: Any, path: Path) -> Any:
    """What stands at a path, `MISSING` if nothing does. A list may be a dict with its places as keys."""
    for key in path:
        if isinstance(tree, Mapping) and (key in tree or str(key) in tree):
            tree = tree[key] if key in tree else tree[str(key)]
        elif isinstance(tree, list | tuple) and isinstance(key, int) and key < len(tree):
            tree = tree[key]
        else:
            return MISSING
    return tree


def nest_lists(flat: Mapping[Path, Any], tuples: frozenset[Path] = frozenset()) -> dict[str, Any]:
    """As `nest`, with a list where the keys are places, or a tuple at these paths."""

    def visit(node: Any, path: Path) -> Any:
        if path in flat:
            return flat[path]
        if not all(isinstance(key, int) for key in node):
            return {key: visit(value, (*path, key)) for key, value in node.items()}
        items = [visit(node[place], (*path, place)) for place in sorted(node)]
        return tuple(items) if path in tuples else items

    return {key: visit(value, (key,)) for key, value in nest(flat).items()}
