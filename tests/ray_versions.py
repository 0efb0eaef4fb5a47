"""`make test-ray`: the tests that depend on Ray's inner code, with several versions of Ray.

    python -m tests.ray_versions .venv/ray-2.50.1/bin/python .venv/ray-2.60.0/bin/python

Each argument is the Python of an environment with one version. Exits with 1 if a version fails.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = (
    "tests/unit/test_tune_changes.py",
    "tests/unit/test_idle_actors.py",
    "tests/unit/test_scheduler.py",
    "tests/unit/test_resume.py",
    "tests/unit/test_snapshot.py",
    "tests/integration/test_searcher_contract.py",
    "tests/integration/test_tune_changes_on_ray.py",
    "tests/integration/test_search_on_ray.py::test_an_interrupted_experiment_is_restored_to_exactly_its_samples",
)


def version_of(python: str) -> str:
    done = subprocess.run(
        [python, "-c", "import ray; print(ray.__version__)"], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def tested(python: str) -> tuple[bool, str]:
    """Whether all tests pass in an environment, and pytest's last line."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}  # the project is not installed there
    command = [python, "-m", "pytest", "-q", "--show-capture=no", *TESTS]
    with subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        last = ""
        for line in process.stdout:
            print(line, end="", flush=True)
            last = line.strip() or last
    return process.returncode == 0, last


def main(pythons: list[str]) -> int:
    rows = []
    for python in pythons:
        version, began = version_of(python), time.monotonic()
        print(f"Ray {version}", flush=True)
        passed, last = tested(python)
        rows.append((version, passed, last, time.monotonic() - began))
    print("\n| Ray | result | tests | seconds |\n| --- | --- | --- | --- |")
    for version, passed, last, seconds in rows:
        counts = last.strip("= ").partition(" in ")[0]
        print(f"| {version} | {'passed' if passed else 'FAILED'} | {counts} | {seconds:.0f} |")
    return 0 if all(passed for _, passed, _, _ in rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
