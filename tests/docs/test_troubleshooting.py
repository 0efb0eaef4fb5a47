"""The messages on the page on troubleshooting are messages of the code."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.docs.pages import ROOT

PAGE = ROOT / "docs/how-to/troubleshooting.md"
MESSAGES = re.findall(r"^### `(.+)`$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)


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


@pytest.mark.parametrize("message", MESSAGES)
def test_the_message_is_one_of_the_code(message: str) -> None:
    wanted = re.sub(r"\{\w+\}", "\0", message)
    assert any(wanted in text for text in TEXTS)


def test_there_are_messages() -> None:
    assert len(MESSAGES) > 10
