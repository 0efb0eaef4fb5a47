"""The reference pages that are made from the code: nothing is missing on them."""

from __future__ import annotations

import importlib.util
import re
from types import ModuleType

import pytest

from raybilevel.problems import PROBLEMS
from tests.docs.pages import ROOT


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs/site/generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(page: str) -> list[list[str]]:
    tables = [line for line in page.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in tables]


def test_every_config_key_has_a_type_and_a_meaning(generate: ModuleType) -> None:
    found = rows(generate.config_page())
    assert {"`problem`", "`trainings`", "`upper`", "`budget`", "`searcher`"} <= {row[0] for row in found}
    assert all(all(row) for row in found), [row for row in found if not all(row)]


def test_every_command_and_option_has_a_meaning(generate: ModuleType) -> None:
    page = generate.command_page()
    for name, command in generate.commands():
        assert f"## raybilevel {name}" in page
        assert command.help
    found = rows(page)
    assert {"`CONFIG`", "`--resume`", "`--set KEY=VALUE`"} <= {row[0] for row in found}
    assert all(all(row) for row in found), [row for row in found if not all(row)]


def test_every_problem_is_listed_with_what_it_is(generate: ModuleType) -> None:
    found = {row[0].strip("`"): row for row in rows(generate.problem_page()) if not row[0].startswith("`configs/")}
    assert found.keys() == PROBLEMS.keys()
    assert all(row[1] for row in found.values())


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("About.\n\nlow, high: the\n    bounds.", {"low": "the bounds.", "high": "the bounds."}),
        ("No names here.", {}),
        ("a: first.\n\n    an equation", {"a": "first."}),
    ],
)
def test_names_that_a_docstring_explains(generate: ModuleType, docstring: str, expected: dict[str, str]) -> None:
    assert generate.entries(docstring) == expected
