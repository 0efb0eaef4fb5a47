"""A run from the command line, as the pages on its report and its summary describe it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from raybilevel.search._new_data import NewData
from tests.docs.pages import ROOT, run

PAGE = ROOT / "docs/reference/summary.md"
SECTIONS = {"The whole": None} | {
    name: name for name in ("best", "lowest", "start", "gain", "new_data", "diagnostics", "history")
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a page that speaks of runs/digits finds it."""
    found = tmp_path_factory.mktemp("run")
    command = [
        *(sys.executable, "-m", "raybilevel", "run", str(ROOT / "configs/digits.yaml"), "--out", "runs/digits"),
        *("--set", "search.trainings=5", "--set", "options.epochs=3"),
    ]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=found, env=environment, check=True, capture_output=True, timeout=300)
    return found


def documented(section: str) -> set[str]:
    text = PAGE.read_text(encoding="utf-8").split(f"\n## {section}\n")[1].split("\n## ")[0]
    cells = re.findall(r"^\| (`[^|]*) \|", text, flags=re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}


def keys(value: Any) -> set[str]:
    entries: Iterable[dict[str, Any]] = value if isinstance(value, list) else [value]
    return {key for entry in entries for key in entry}


@pytest.mark.slow
@pytest.mark.parametrize("section", SECTIONS)
def test_the_page_on_the_summary_names_every_key(folder: Path, section: str) -> None:
    summary = json.loads((folder / "runs/digits/summary.json").read_text(encoding="utf-8"))
    name = SECTIONS[section]
    found = summary if name is None else summary[name]
    if found is None:  # a run of five trainings has taken too few steps to say it
        assert name == "new_data"
        found = {field.name: None for field in fields(NewData)}
    assert documented(section) == keys(found)


@pytest.mark.slow
def test_the_page_on_the_report_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    run(ROOT / "docs/tutorials/report.md")
