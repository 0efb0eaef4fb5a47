"""Every command line in the documents is one that the command, the Makefile and the configs know."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from raybilevel._config.experiment import ExperimentConfig
from raybilevel.cli import app
from tests.docs.pages import FENCE, HIDDEN, PAGES, ROOT, blocks, name_of

COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
START = re.compile(r"(?:^|[ ~/])raybilevel (?=[a-z])")


def lines(page: Path) -> Iterator[str]:
    """Lines of console blocks and of indented code, and code within the text; comments and brackets are left out."""
    text = page.read_text(encoding="utf-8")
    for block in blocks(page):
        if block.language in ("console", ""):
            yield from (line.removeprefix("$ ") for line in block.code.replace("\\\n", " ").splitlines())
    text = HIDDEN.sub("", FENCE.sub("", text))
    yield from (re.sub(r"\n +", " ", code) for code in re.findall(r"^    (\S.*(?:\n {20,}\S.*)*)$", text, re.MULTILINE))
    yield from (" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text))


def words(line: str) -> list[str]:
    return shlex.split(re.sub(r"[\[\]]|\.\.\.", "", line), comments=True)


def command_lines(page: Path) -> list[str]:
    """Lines that call raybilevel, from its name on."""
    found = []
    for line in lines(page):
        match = START.search(line)
        if match is not None:
            found.append(line[match.start() :].lstrip(" ~/"))
    return found


LINES = [(page, line) for page in PAGES for line in command_lines(page)]


def known_key(dotted: str) -> bool:
    """Whether a config may have a key."""
    schema = ExperimentConfig.model_json_schema()
    node: dict[str, Any] = schema
    for part in dotted.split("."):
        references = re.findall(r"#/\$defs/(\w+)", str({k: v for k, v in node.items() if k != "$defs"}))
        if "properties" not in node and references:
            node = schema["$defs"][references[0]]
        if "properties" not in node:
            return True  # below a mapping of any keys
        if part not in node["properties"]:
            return False
        node = node["properties"][part]
    return True


def test_there_are_lines_to_check() -> None:
    assert len(LINES) > 20


@pytest.mark.parametrize(("page", "line"), LINES, ids=lambda value: name_of(value) if isinstance(value, Path) else None)
def test_command_line(page: Path, line: str) -> None:
    _, name, *rest = words(line)
    assert name in COMMANDS
    command = COMMANDS[name]
    options = {text: p for p in command.params for text in p.opts if p.param_type_name == "option"}
    rest.reverse()
    while rest:
        word = rest.pop()
        if not word.startswith("--"):
            assert not word.startswith("configs/") or (ROOT / word).exists()
            continue
        assert word in options, f"{name} has no option {word}"
        if not options[word].is_flag:
            value = rest.pop()
            assert word != "--set" or value in ("key=value", "KEY=VALUE") or known_key(value.partition("=")[0]), value


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_keys_that_set_changes(page: Path) -> None:
    for code in lines(page):
        for key in re.findall(r"--set '?([\w.]+)=", code):
            assert key in ("key", "KEY") or known_key(key), key


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_make_targets(page: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for line in lines(page):
        match = re.match(r"make ([a-z][\w-]*)", line)
        assert match is None or match[1] in targets, line
