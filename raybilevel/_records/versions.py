"""What a run was made with: versions of packages, and a digest of the algorithm's own code."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import platform
from collections.abc import Sequence
from pathlib import Path

PACKAGES = ("raybilevel", "ray", "torch", "botorch", "gpytorch", "numpy")

NO_ALGORITHM = frozenset({
    "problems", "report", "_command", "_compare", "_records", "cli.py", "__main__.py", "_version.py",
})  # fmt: skip
"""Parts of the package, by the first name of their path, in which a change does not alter what a search does."""


def versions(more: Sequence[str] = ()) -> dict[str, str | None]:
    """Of Python and packages, by name; None for one that is not installed."""
    return {"python": platform.python_version()} | {name: installed(name) for name in (*PACKAGES, *more)}


def installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def core_digest(package: Path = Path(__file__).parents[1]) -> str:
    """Which algorithm made a record: a digest of the package's code, without comments, docstrings and layout.

    Two versions of Python may write the same code down differently, and then the digests differ too.
    """
    found = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        place = path.relative_to(package)
        if place.parts[0] not in NO_ALGORITHM:
            found.update(f"{place.as_posix()}\n{bare_code(path.read_text(encoding='utf-8'))}\n".encode())
    return found.hexdigest()[:12]


def bare_code(source: str) -> str:
    """Python code as its syntax tree has it, without what does nothing: comments and strings on their own."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        for name in ("body", "orelse", "finalbody"):
            statements = getattr(node, name, None)
            if isinstance(statements, list):
                setattr(node, name, [s for s in statements if not is_words(s)])
    return ast.dump(tree)


def is_words(statement: ast.AST) -> bool:
    """A docstring, or a string after a name that it is about."""
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )
