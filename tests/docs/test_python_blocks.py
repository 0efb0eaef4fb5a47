"""Every Python block of the documents runs. Blocks of a page share a namespace."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

from tests.docs.pages import PAGES, ROOT, Block, name_of, needs, python, run

EXTRAS = {"lightning", "skorch", "transformers"}
NEEDS_A_RUN = ROOT / "docs/tutorials/report.md"  # test_summary.py makes one


def uses_ray(page: Path) -> bool:
    return any(call in block.code for block in python(page) if not block.not_run for call in (").fit()", "tune.run("))


RUN = [page for page in PAGES if any(not block.not_run for block in python(page))]
ALONE = [page for page in RUN if not uses_ray(page) and page != NEEDS_A_RUN]
ON_RAY = [page for page in RUN if uses_ray(page)]


def require(page: Path) -> None:
    for package in needs(page):
        pytest.importorskip(package, reason=f"{package} is not installed")


@pytest.mark.parametrize("page", ALONE, ids=name_of)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require(page)
    monkeypatch.chdir(tmp_path)
    run(page)


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("page", ON_RAY, ids=name_of)
def test_python_blocks_run_on_ray(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require(page)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))  # where Tune keeps trials
    run(page)


@pytest.mark.parametrize(
    "block", [b for page in PAGES for b in python(page) if b.not_run], ids=lambda block: block.place
)
def test_blocks_that_do_not_run_can_be_compiled_and_import_what_there_is(block: Block) -> None:
    require(block.page)
    for node in ast.walk(ast.parse(block.code, block.place)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            assert all(hasattr(module, alias.name) for alias in node.names), block.place
        elif isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_pages_say_which_extras_their_blocks_need(page: Path) -> None:
    code = [ast.parse(block.code) for block in python(page)]
    modules = {
        name.split(".")[0]
        for tree in code
        for node in ast.walk(tree)
        for name in (
            [str(node.module)] if isinstance(node, ast.ImportFrom)
            else [alias.name for alias in node.names] if isinstance(node, ast.Import)
            else []
        )
    }  # fmt: skip
    assert modules & EXTRAS == set(needs(page))
