"""The versions of a run: of packages, and a digest of the algorithm's own code."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import platform
from collections.abc import Sequence
from pathlib import Path

PACKAGES = ("raybilevel", "ray", "torch", "botorch", "gpytorch", "numpy")

NOT_ALGORITHM = frozenset({
    "problems", "report", "_command", "_compare", "_records", "cli.py", "__main__.py", "_version.py",
})  # fmt: skip
"""Parts of the package, by the first name of their path, that do not influence a search."""


def versions(more: Sequence[str] = ()) -> dict[str, str | None]:
    """Versions of Python and of packages, by name; None for a package that is not installed."""
    return {"python": platform.python_version()} | {name: installed(name) for name in (*PACKAGES, *more)}


def installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def core_digest(package: Path = Path(__file__).parents[1]) -> str:
    """A digest of the algorithm's code, without comments, docstrings and layout.

    Versions of Python may differ in their syntax trees of the same code, and then the digests differ too.
    """
    found = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        place = path.relative_to(package)
        if place.parts[0] not in NOT_ALGORITHM:
            found.update(f"{place.as_posix()}\n{bare_code(path.read_text(encoding='utf-8'))}\n".encode())
    return found.hexdigest()[:12]


def bare_code(source: str) -> str:
    """The syntax tree of Python code as text, without comments and without strings that are statements."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        for name in ("body", "orelse", "finalbody"):
            statements = getattr(node, name, None)
            if isinstance(statements, list):
                setattr(node, name, [s for s in statements if not is_bare_string(s)])
    return ast.dump(tree)


def is_bare_string(statement: ast.AST) -> bool:
    """Whether a statement is a docstring, or a string that documents the constant before it."""
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )
