"""Every example runs as it stands, and does what it says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ELSEWHERE = {ROOT / "examples" / "data_parallel.py"}  # tests/cluster runs it
EXAMPLES = sorted({*(ROOT / "examples").glob("*.py")} - ELSEWHERE)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example(example: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(example)],
        capture_output=True, text=True, timeout=400, env=environment, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    losses = [float(number) for number in re.findall(r"(?:validation loss|best F) ([\d.]+)", done.stdout)]
    assert losses
    assert min(losses) < 0.15


def test_the_example_in_the_readme_is_the_one_that_is_tested() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    source = (ROOT / "examples" / "quickstart.py").read_text(encoding="utf-8")
    collapsed = " ".join(source.split())
    search = next(block for block in blocks if "tune.Tuner(" in block)
    call = search[search.index("results = ") :]
    assert " ".join(call.split()) in collapsed
