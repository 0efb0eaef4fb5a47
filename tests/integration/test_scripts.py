"""A script of examples/scripts on Ray, from its command line; tests/unit has all of them without."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "scripts" / "sgd_classifier.py"


@pytest.mark.parametrize("searcher", ["random", "optuna-gp"])
def test_a_script_runs_from_its_command_line(searcher: str, tmp_path: Path) -> None:
    pytest.importorskip("optuna", reason="optuna is not installed")
    run = subprocess.run(
        [sys.executable, str(SCRIPT), "--searcher", searcher, "--num-samples", "3"],
        capture_output=True, text=True, cwd=tmp_path, timeout=300,
        env={**os.environ, "RAY_AUTH_MODE": "disabled", "HOME": str(tmp_path)},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "positive_weight" in run.stdout
    assert re.search(r"val_loss \d+\.\d{4}, val_accuracy 0\.\d{4}, test_loss", run.stdout)
