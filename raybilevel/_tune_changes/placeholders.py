"""What Tune's placeholders stand for: the functions and objects of a `param_space`.

Before Tune shows a searcher the space, it puts a placeholder in the place of each object and each `sample_from`
function, and after a suggestion it puts them back. So a searcher could neither evaluate the functions nor check a
problem with the objects. We look for Tune's table of placeholders among the local variables of `tune.run`, which calls
us, and take out of it what the search suggests itself.

Read in ray/tune/tune.py and ray/tune/impl/placeholder.py of Ray 2.60.0. Where there is no such table, placeholders stay
and are refused by name.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from ray.tune.search.sample import Categorical

TABLE = "placeholder_resolvers"
TOKENS = ("__fn_ph", "__ref_ph")


def table_of_tune_run() -> dict[tuple[Any, ...], list[Any]] | None:
    """Tune's table of the run that is calling, by path; None outside of a run."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == "ray.tune.tune" and TABLE in frame.f_locals:
            # Tune's own dict and no copy: a placeholder that is taken out of it here is not resolved.
            found: dict[tuple[Any, ...], list[Any]] = frame.f_locals[TABLE]
            return found
        frame = frame.f_back  # type: ignore[assignment]
    return None


def filled(tree: Any, table: Mapping[tuple[Any, ...], list[Any]]) -> Any:
    """A space as it was before Tune put placeholders into it. The space itself is not changed."""
    known = {resolver.hash: resolver for resolvers in table.values() for resolver in resolvers}
    return _filled(tree, known)


def _filled(node: Any, known: Mapping[str, Any]) -> Any:
    if type(node) is tuple and len(node) == 2 and node[0] in TOKENS and node[1] in known:
        resolver = known[node[1]]
        return resolver._fn if node[0] == TOKENS[0] else resolver._value
    if isinstance(node, Mapping):
        return {key: _filled(value, known) for key, value in node.items()}
    if isinstance(node, list):
        return [_filled(item, known) for item in node]
    if type(node) is tuple:
        return tuple(_filled(item, known) for item in node)
    return Categorical(_filled(list(node.categories), known)) if isinstance(node, Categorical) else node


def take_over(table: dict[tuple[Any, ...], list[Any]], constants: Mapping[tuple[Any, ...], Any]) -> None:
    """Leave Tune only the placeholders that stand in constants, by path. For others it gets values."""
    for path in list(table):
        if not any(path[:length] in constants for length in range(1, len(path) + 1)):
            del table[path]
