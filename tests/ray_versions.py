"""`make test-ray`: the tests that depend on Ray's inner code, with several versions of Ray.

    python -m tests.ray_versions .venv/ray-2.50.1/bin/python .venv/ray-2.60.0/bin/python

Each argument is the Python of an environment with one version. Exits with 1 if a version fails.
"""

from __future__ import annotations

import subprocess
import sys

from tests.environments import Outcome, results_of, show

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


def main(pythons: list[str]) -> int:
    outcomes: list[Outcome] = []
    for python in pythons:
        version = version_of(python)
        print(f"Ray {version}", flush=True)
        outcomes.append(results_of(version, python, TESTS))
    return show("Ray", outcomes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
