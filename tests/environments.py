"""Tests in other environments than this one, and a table of how they ended."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PASSED, MISSING = "passed", "not found"


class Outcome(NamedTuple):
    """name: of the environment. words: pytest's counts, or why there are none."""

    name: str
    result: str
    words: str = ""
    seconds: float = 0.0


def results_of(name: str, python: str, arguments: Sequence[str]) -> Outcome:
    """Run pytest with a Python in which the project need not be installed."""
    began = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [python, "-m", "pytest", "-q", "--show-capture=no", *arguments]
    with subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        last = ""
        for line in process.stdout:
            print(line, end="", flush=True)
            last = line.strip() or last
    passed, counts = process.returncode == 0, last.strip("= ").partition(" in ")[0]
    return Outcome(name, PASSED if passed else "FAILED", counts, time.monotonic() - began)


def show(what: str, outcomes: Sequence[Outcome]) -> int:
    """Print the table. Returns the exit status: 1 unless one passed, and all others passed or are not there.

    what: the heading of their names.
    """
    print(f"\n| {what} | result | tests | seconds |\n| --- | --- | --- | --- |")
    for name, result, words, seconds in outcomes:
        print(f"| {name} | {result} | {words} | {seconds:.0f} |")
    results = {outcome.result for outcome in outcomes}
    return 0 if PASSED in results and results <= {PASSED, MISSING} else 1
