"""A script of examples/scripts on Ray, from its command line; tests/unit has all of them without."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "scripts"


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(["sgd_classifier.py", "--searcher", "random"], marks=pytest.mark.slow),
        ["sgd_classifier.py", "--searcher", "optuna-gp"],
        ["sgd_classifier_bilevel.py"],
    ],
    ids=" ".join,
)
def test_a_script_runs_from_its_command_line(command: list[str], tmp_path: Path) -> None:
    if "optuna-gp" in command:
        pytest.importorskip("optuna", reason="optuna is not installed")
    run = subprocess.run(
        [sys.executable, str(FOLDER / command[0]), *command[1:], "--num-samples", "3"],
        capture_output=True, text=True, cwd=tmp_path, timeout=300,
        env={**os.environ, "RAY_AUTH_MODE": "disabled", "HOME": str(tmp_path)},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "positive_weight" in run.stdout
    found = re.search(r"^val_loss .*", run.stdout, flags=re.MULTILINE)
    assert found is not None
    named = dict(metric.split() for metric in found[0].split(", "))
    assert named.keys() == {"val_loss", "val_accuracy", "test_loss", "test_accuracy"}
    assert all(float(value) > 0 for value in named.values())
