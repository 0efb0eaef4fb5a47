"""`make test-pythons`: the unit tests and a search on Ray, under several versions of Python.

    python -m tests.python_versions 3.11 3.12 --folder .venv

Each version has an environment of its own in the folder, which the Makefile sets up as it does this one. A version that
the machine lacks, or for which a package cannot be installed, has a row of the table that says so. Exits with 1 if one
fails or cannot be installed, or if there is none.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.environments import MISSING, ROOT, Outcome, results_of, show

TESTS = (
    "-m", "not slow", "tests/unit",
    "tests/integration/test_search_on_ray.py::test_tuner_finds_the_known_optimum",
)  # fmt: skip


def candidates(version: str) -> Iterator[str]:
    """Where a Python of this version may be: on the path, or among those of pyenv."""
    if found := shutil.which(f"python{version}"):
        yield found
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    yield from map(str, sorted(root.glob(f"versions/{version}.*/bin/python")))


def find(version: str) -> str | None:
    """The first that runs: what pyenv puts on the path need not."""
    for python in candidates(version):
        command = [python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError:
            continue
        if done.returncode == 0 and done.stdout.strip() == version:
            return python
    return None


def setup(python: str, folder: Path) -> str | None:
    """Set up an environment by the Makefile. Returns why that failed."""
    done = subprocess.run(
        ["make", f"PYTHON={python}", f"VENV={folder}", "setup"], cwd=ROOT, text=True, stderr=subprocess.PIPE
    )
    if done.returncode == 0:
        return None
    print(done.stderr, file=sys.stderr, flush=True)
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")]
    return (errors or ["the environment cannot be set up"])[0].removeprefix("ERROR: ")


def outcome(version: str, folder: Path, arguments: list[str]) -> Outcome:
    print(f"Python {version}", flush=True)
    python = find(version)
    if python is None:
        return Outcome(version, MISSING, f"no python{version} on the path that runs, and none of pyenv")
    if (wrong := setup(python, folder)) is not None:
        return Outcome(version, "NOT INSTALLED", wrong)
    return results_of(version, str(folder / "bin" / "python"), [*TESTS, *arguments])


def main() -> int:
    parser = argparse.ArgumentParser(description="Test several versions of Python.")
    parser.add_argument("versions", nargs="+", help="such as 3.12")
    parser.add_argument("--folder", type=Path, default=ROOT / ".venv", help="where their environments are made")
    chosen, arguments = parser.parse_known_args()
    folder = chosen.folder.absolute()
    return show("Python", [outcome(v, folder / f"python-{v}", arguments) for v in chosen.versions])


if __name__ == "__main__":
    sys.exit(main())
