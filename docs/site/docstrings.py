"""Docstrings as Markdown: lines such as "name: what it is" become lists. An extension of griffe."""

from __future__ import annotations

import re
from typing import Any

import griffe

ENTRY = re.compile(r"^(?P<names>[a-z]\w*(?:, [a-z]\w*)*): +(?P<text>\S.*)$")


def as_markdown(text: str) -> str:
    """The names that a docstring explains, as a list; the rest as it is."""
    lines: list[str] = []
    in_list = False
    for line in text.splitlines():
        entry = ENTRY.match(line)
        if entry is not None:
            names = ", ".join(f"`{name}`" for name in entry["names"].split(", "))
            lines += [*([] if in_list or not lines or not lines[-1] else [""]), f"- {names}: {entry['text']}"]
            in_list = True
        elif in_list and line and not line.startswith(" "):
            lines += ["", line]
            in_list = False
        else:
            lines.append(line)
            in_list = in_list and bool(line)
    return "\n".join(lines)


class Lists(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.name.startswith("__"):
            obj.docstring = None  # what Python calls, not the reader: without a docstring it is left out
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
