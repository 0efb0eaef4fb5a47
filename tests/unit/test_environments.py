"""Other environments in which the tests are run, by `make test-pythons` and `make test-ray`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests import environments, python_versions
from tests.environments import Outcome, results_of, show
from tests.python_versions import find, outcome

HERE = f"{sys.version_info[0]}.{sys.version_info[1]}"


def executable(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_a_python_on_the_path_that_does_not_run_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    executable(tmp_path / "shims" / f"python{HERE}", "exit 127")
    monkeypatch.setenv("PATH", str(tmp_path / "shims"))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    assert find(HERE) is None
    real = executable(tmp_path / "pyenv" / "versions" / f"{HERE}.99" / "bin" / "python", f'exec {sys.executable} "$@"')
    assert find(HERE) == str(real)


def test_a_version_that_is_missing_or_cannot_be_installed_is_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = outcome("3.99", tmp_path, [])
    make = "echo 'ERROR: No matching distribution found for torch==2.13.0' >&2; exit 2"
    executable(tmp_path / "make", make)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(python_versions, "find", lambda version: sys.executable)
    outcomes = [missing, outcome(HERE, tmp_path, []), Outcome("3.98", "passed", "2 passed", 3.2)]
    assert show("Python", outcomes) == 1
    assert capsys.readouterr().out.splitlines()[-5:] == [
        "| Python | result | tests | seconds |",
        "| --- | --- | --- | --- |",
        "| 3.99 | not found | no python3.99 on the path that runs, and none of pyenv | 0 |",
        f"| {HERE} | NOT INSTALLED | No matching distribution found for torch==2.13.0 | 0 |",
        "| 3.98 | passed | 2 passed | 3 |",
    ]
    assert show("Python", [outcomes[0], outcomes[2]]) == 0  # a machine need not have every version
    assert show("Python", outcomes[:1]) == 1


def test_tests_that_fail_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environments, "ROOT", tmp_path)
    (tmp_path / "test_both.py").write_text("def test_one(): pass\ndef test_two(): assert False\n")
    name, result, words, seconds = results_of("here", sys.executable, ["test_both.py"])
    assert (name, result, words) == ("here", "FAILED", "1 failed, 1 passed")
    assert seconds > 0
