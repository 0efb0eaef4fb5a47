"""The command in a process of its own, as a user calls it."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from raybilevel._command.output import show_how_to_go_on
from raybilevel._version import __version__
from raybilevel.cli import main

ROOT = Path(__file__).parents[2]
DATA = os.environ.get("RAYBILEVEL_TEST_DATA")
SMALL = ["--set", "search.trainings=7", "--set", "options={train: 100, epochs: 4}"]


def raybilevel(*arguments: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-m", "raybilevel", *arguments],
        capture_output=True, text=True, timeout=timeout, env=environment, cwd=ROOT, check=False,
    )  # fmt: skip


def test_a_run_writes_its_summary_config_and_storage(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = raybilevel("run", "configs/digits.yaml", "--out", str(out), *SMALL)
    assert done.returncode == 0, done.stderr
    assert "[7/7]" in done.stdout  # plain lines where the output is no terminal
    assert "best" in done.stdout and "test_accuracy 0." in done.stdout
    assert "\x1b[" not in done.stdout
    summary = json.loads((out / "summary.json").read_text())
    assert {"problem", "method", "seed", "versions", "best", "trainings", "failed_trainings", "upper_steps", "cost",
            "wall_seconds", "history"} <= set(summary)  # fmt: skip
    assert set(summary["best"]) == {
        "hyperparameters", "lower_loss", "upper_loss", "test_loss", "test_loss_refit", "checkpoint",
    }  # fmt: skip
    assert summary["trainings"] == 7
    assert summary["failed_trainings"] == 0
    assert 3 <= summary["upper_steps"] <= 6  # one may be under way at the end
    assert summary["cost"] > 7  # upper-level steps are charged
    entries = summary["history"]
    assert [entry["best_upper_loss"] for entry in entries] == sorted(
        (entry["best_upper_loss"] for entry in entries), reverse=True
    )
    assert summary["best"]["upper_loss"] == entries[-1]["best_upper_loss"]
    assert set(entries[0]["hyperparameters"]["weight_decay"]) == {"fc1", "fc2", "fc3"}
    assert Path(summary["best"]["checkpoint"], "lower_level.pt").is_file()
    assert summary["best"]["test_loss_refit"] < summary["best"]["test_loss"]  # four times the data
    assert "trainings: 7" in (out / "config.yaml").read_text()
    again = raybilevel("run", "configs/digits.yaml", "--out", str(out), *SMALL)
    assert again.returncode == 2
    assert "already holds a run" in again.stderr


@pytest.mark.parametrize("how", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_ctrl_c_leaves_a_run_that_resume_continues(how: signal.Signals, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["run", "configs/digits.yaml", "--out", str(out), "--set", "search.trainings=6",
                 "--set", "options={train: 100, epochs: 12}"]  # fmt: skip
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    process = subprocess.Popen(
        [sys.executable, "-m", "raybilevel", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT,
    )  # fmt: skip
    deadline = time.monotonic() + 200
    while process.poll() is None and time.monotonic() < deadline and len(list(out.glob("tune/lower_level_*"))) < 4:
        time.sleep(0.1)
    process.send_signal(how)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    assert "--resume" in stdout
    assert "Traceback" not in stderr
    hint = next(line for line in stdout.splitlines() if "--resume" in line).split()
    resumed = raybilevel(*hint[hint.index("run") :])  # as it is printed, though the run had --set
    assert resumed.returncode == 0, resumed.stderr
    summary = json.loads((out / "summary.json").read_text())
    assert summary["trainings"] == 6
    points = [json.dumps(entry["hyperparameters"]) for entry in summary["history"]]
    assert len(set(points)) == 6  # nothing was trained twice, nothing lost
    other = raybilevel(*arguments[:-1], "options={train: 101}", "--resume")
    assert other.returncode == 2
    assert "differs" in other.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "no/such.yaml"], "no/such.yaml: cannot read"),
        (["check", "configs/digits.yaml", "--set", "search.budget=3"], "search.budget: no such key"),
        (["check", "configs/digits.yaml", "--set", "problem=digit"], "unknown problem 'digit'; choose one of"),
        (["check", "configs/digits.yaml", "--set", "options.trian=3"], "no option 'trian'; it has train"),
        (["check", "configs/digits.yaml", "--set", "search.method=asha"], "unknown method 'asha'"),
        (["check", "configs/digits.yaml", "--set", "search.settings.speed=3"], "no setting 'speed'"),
        (
            ["check", "configs/digits.yaml", "--set", "space.extra={loguniform: [1, 2]}"],
            "extra: nothing in",
        ),
        (["check", "configs/digits.yaml", "--set", "space.weight_decay.fc1={loguniform: [2, 1]}"], "weight_decay/fc1"),
        (["check", "configs/digits.yaml", "--set", "space.weight_decay.fc1={choices: [2, 1]}"], "unknown domain"),
        (["check", "configs/digits.yaml", "--set", "resources.lower.cpu=9999"], "a training asks for CPU: 9999"),
        (["run", "configs/digits.yaml", "--set", "resources.lower.cpu=9999"], "join a cluster by --address"),
        (
            ["check", "configs/digits.yaml", "--set", "search.points_to_evaluate=[{weight_decay: {fc1: 1e9}}]"],
            "search.points_to_evaluate[0]",
        ),
        (["run", "configs/compare/quick.yaml"], "use `raybilevel compare configs/compare/quick.yaml`"),
        (["compare", "configs/digits.yaml"], "use `raybilevel run configs/digits.yaml`"),
        (["check", "configs/mnist.yaml"], "--data"),
        (["check", "configs/mnist.yaml", "--data", "no_such_folder"], "expected in"),
        (["run", "configs/digits.yaml", "--resume"], "--out"),
        (["run", "configs/digits.yaml", "--resume", "--out", "no_such_folder"], "there is no run"),
        (["walk"], "No such command"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_and_status_2(
    arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["raybilevel", *arguments])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    assert words in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("command", ["run", "compare"])
def test_the_command_to_go_on_is_one_that_a_shell_takes(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["my tools/raybilevel"])
    folder, storage = Path("my runs/a;b"), "s3://bucket/run?scheme=http&region=here"
    show_how_to_go_on(Console(), command, folder, None, "auto", storage)
    assert shlex.split(capsys.readouterr().out) == [
        "my tools/raybilevel", command, "my runs/a;b/config.yaml", "--out", "my runs/a;b", "--address", "auto",
        "--storage", storage, "--resume",
    ]  # fmt: skip


def test_a_config_error_in_a_process_of_its_own() -> None:
    done = raybilevel("run", "no/such.yaml")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("config", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_check_says_what_a_config_would_do(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if DATA is None and not config.stem.startswith("digits"):
        pytest.skip("RAYBILEVEL_TEST_DATA does not name a folder with the data files")
    monkeypatch.setattr(sys, "argv", ["raybilevel", "check", str(config), *(["--data", DATA] if DATA else [])])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert not exit_.value.code
    assert "all right" in capsys.readouterr().out


def test_the_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["raybilevel", "--version"])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert not exit_.value.code
    assert capsys.readouterr().out == f"raybilevel {__version__}\n"


def test_problems_lists_what_ships() -> None:
    done = raybilevel("problems")
    assert done.returncode == 0
    for name in ("digits", "digits_logistic", "mnist", "mnist_1k", "cifar_lenet"):
        assert name in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(DATA is None, reason="RAYBILEVEL_TEST_DATA does not name a folder with mnist_1k/ and mnist/")
def test_the_published_setting_runs_on_the_published_data(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert DATA is not None
    small = ["--set", "search.trainings=6", "--set", "options.epochs=10"]
    done = raybilevel("run", "configs/mnist_1k.yaml", "--data", DATA, "--out", str(out), *small)
    assert done.returncode == 0, done.stderr
    best = json.loads((out / "summary.json").read_text())["best"]
    assert best["upper_loss"] < 0.7
    assert best["test_loss_refit"] < best["test_loss"] < 0.7
