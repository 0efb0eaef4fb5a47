"""The documents as tests see them: pages, and the blocks of code in them."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)\n(?P<code>.*?)^(?P=indent)```", re.DOTALL | re.MULTILINE)
HIDDEN = re.compile(r"^<!-- run\n(?P<code>.*?)^-->", re.DOTALL | re.MULTILINE)
NEEDS = re.compile(r"^<!-- needs: (?P<packages>[^>]+) -->$", re.MULTILINE)
NOT_RUN = re.compile(r"<!-- not run: (?P<reason>[^>]+) -->\s*$")


@dataclass(frozen=True)
class Block:
    """A block of code.

    line:    of the page, at which its code begins.
    not_run: why a test does not run it, from the comment before it; empty where it runs.
    """

    page: Path
    line: int
    language: str
    code: str
    not_run: str = ""

    @property
    def place(self) -> str:
        return f"{name_of(self.page)}:{self.line}"


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[Block]:
    """Fenced blocks, and those in comments that begin with "run", in their order."""
    return sorted([*fenced(page), *hidden(page)], key=lambda block: block.line)


def fenced(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        code = re.sub(f"^{match['indent']}", "", match["code"], flags=re.MULTILINE)
        reason = NOT_RUN.search(text[: match.start()])
        line = text.count("\n", 0, match.start()) + 2
        yield Block(page, line, match["language"], code, reason["reason"] if reason else "")


def hidden(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for match in HIDDEN.finditer(text):
        yield Block(page, text.count("\n", 0, match.start()) + 2, "python", match["code"])


def needs(page: Path) -> list[str]:
    """Packages of an extra that the blocks of a page import, from the comment on it."""
    return [
        name for match in NEEDS.finditer(page.read_text(encoding="utf-8")) for name in match["packages"].split(", ")
    ]


def python(page: Path) -> list[Block]:
    return [block for block in blocks(page) if block.language == "python"]


def run(page: Path) -> None:
    """Run the Python blocks of a page in one namespace."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in python(page):
        if not block.not_run:
            # The lines of the page, so that a traceback shows where.
            code = compile("\n" * (block.line - 1) + block.code, str(page), "exec")
            with contextlib.redirect_stdout(io.StringIO()):
                exec(code, namespace)
