"""The messages on the page on troubleshooting are messages of the code, and those of a search are all there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.docs.pages import ROOT

PAGE = ROOT / "docs/how-to/troubleshooting.md"
MESSAGES = re.findall(r"^(?:### |\| )`(.+?)`(?:$| \|)", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
WHOLE = (
    "search", "tune", "hypergradient", "methods", "sklearn", "report", "_cluster", "_command", "_descents", "_linear",
    "_lower", "_models", "_records", "_tune_changes", "cli.py", "folds.py", "problem.py", "_metrics.py",
    "_own_problem.py", "_adapters", "lightning.py", "loop.py", "skorch.py", "transformers.py",
)  # fmt: skip
"""Modules and packages whose messages all have a row. The others check configs, spaces and arguments of the problems
that ship: each says what the entry that it names may be."""
ELSEWHERE = ("tune/_domains.py",)
"""Search spaces, whose messages say what to do, each for one kind of entry."""


def texts(path: Path) -> list[str]:
    """The strings of a module, with a NUL for each part that differs."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(str(v.value) if isinstance(v, ast.Constant) else "\0" for v in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return found


TEXTS = [text for path in sorted((ROOT / "raybilevel").rglob("*.py")) for text in texts(path)]


def written(text: ast.expr) -> str:
    parts = text.values if isinstance(text, ast.JoinedStr) else [text]
    return "".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in parts)


def said(path: Path) -> list[str]:
    """What a module raises, and what it logs as a warning or an error; without what is made elsewhere."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        call = node.exc if isinstance(node, ast.Raise) else node
        logs = isinstance(call, ast.Call) and ast.unparse(call.func) in ("logger.warning", "logger.error")
        if isinstance(call, ast.Call) and call.args and (logs or isinstance(node, ast.Raise)):
            found.append(written(call.args[0]))
    return [text for text in found if re.search(r"[a-z]{3}", text.replace("%s", ""))]


def pattern(message: str) -> str:
    return re.sub(r"\{\w+\}", "\0", message)


@pytest.mark.parametrize("message", MESSAGES)
def test_the_message_is_one_of_the_code(message: str) -> None:
    assert any(pattern(message) in text for text in TEXTS)


@pytest.mark.parametrize("where", WHOLE)
def test_what_a_search_says_is_on_the_page(where: str) -> None:
    folder = ROOT / "raybilevel"
    modules = sorted((folder / where).rglob("*.py")) if not where.endswith(".py") else [folder / where]
    elsewhere = {folder / path for path in ELSEWHERE}
    rows = [pattern(message) for message in MESSAGES]
    lacking = [
        f"{module.name}: {text}"
        for module in modules
        if module not in elsewhere
        for text in said(module)
        if not any(row in text for row in rows)
    ]
    assert not lacking


def test_there_are_messages() -> None:
    assert len(MESSAGES) > 10
