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

from raybilevel._command.folder import Options, keep_options, read_options
from raybilevel._command.output import show_how_to_go_on
from raybilevel._version import __version__
from raybilevel.cli import main

ROOT = Path(__file__).parents[2]
DATA = os.environ.get("RAYBILEVEL_TEST_DATA")


def raybilevel(*arguments: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-m", "raybilevel", *arguments],
        capture_output=True, text=True, timeout=timeout, env=environment, cwd=ROOT, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_a_problem_of_ones_own_from_its_template_to_more_trainings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"

    def here(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["raybilevel", *arguments])
        main()

    with pytest.raises(SystemExit):
        here("new", str(tmp_path / "mine.py"))
    assert f"raybilevel run {tmp_path / 'mine.yaml'}" in capsys.readouterr().out
    config = [str(tmp_path / "mine.yaml"), "--set", "options.train=60"]
    done = raybilevel("run", *config, "--out", str(out), "--set", "search.trainings=5", "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads((out / "summary.json").read_text())
    assert json.loads(done.stdout) == summary
    assert done.stderr.startswith("starting Ray ...")
    assert "[5/5]" in done.stderr  # plain lines where the output is no terminal
    assert "training once more, on all data" in done.stderr
    assert all(words in done.stderr for words in ("Found: F", "Helped: ", "How sure: ", "test_accuracy 0."))
    assert "\x1b[" not in done.stderr
    assert {"problem", "method", "seed", "versions", "best", "trainings", "failed_trainings", "upper_steps", "cost",
            "wall_seconds", "history"} <= set(summary)  # fmt: skip
    assert set(summary["best"]) == {
        "training", "hyperparameters", "lower_loss", "upper_loss", "expected_upper_loss", "test_loss",
        "test_loss_refit", "checkpoint", "feasible",
    }  # fmt: skip
    assert summary["trainings"] == 5
    assert summary["failed_trainings"] == 0
    assert 1 <= summary["upper_steps"] <= 4  # one may be under way at the end
    assert summary["cost"] > 5  # upper-level steps are charged
    entries = summary["history"]
    assert [entry["best_upper_loss"] for entry in entries] == sorted(
        (entry["best_upper_loss"] for entry in entries), reverse=True
    )
    assert summary["best"]["upper_loss"] == entries[-1]["best_upper_loss"]
    assert set(entries[0]["hyperparameters"]["weight_decay"]) == {"first", "last"}
    assert summary["best"]["test_loss_refit"] < summary["best"]["test_loss"]  # twice the data
    # One number for a training: that of Tune's trial, whose folder has the checkpoint.
    checkpoint = Path(summary["best"]["checkpoint"])
    assert (checkpoint / "lower_level.pt").is_file()
    assert checkpoint.parent.name.split("_")[3] == str(summary["best"]["training"])
    assert "trainings: 5" in (out / "config.yaml").read_text()
    with pytest.raises(SystemExit):
        here("run", *config, "--out", str(out))
    assert "already holds a run" in capsys.readouterr().err
    # More of the same, after its end.
    more = raybilevel("resume", str(out), "--trainings", "6")
    assert more.returncode == 0, more.stderr
    assert "going on after 5 trainings" in more.stdout and "[6/6]" in more.stdout
    extended = json.loads((out / "summary.json").read_text())
    assert extended["trainings"] == 6
    assert extended["history"][:5] == entries


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
    assert "Traceback" not in stderr
    hint = next(line for line in stdout.splitlines() if "resume" in line)
    resumed = subprocess.run(  # as it is printed, though the run had --set
        hint, shell=True, capture_output=True, text=True, timeout=240, env=environment, cwd=ROOT, check=False
    )
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
        (["check", "configs/digits.yaml", "--set", "space.weight_decay.fc1=[1e-3, 1e2]"], "is a list, and no domain"),
        (["check", "configs/compare/quick.yaml"], "use `raybilevel compare configs/compare/quick.yaml`"),
        (["run", "examples/quickstart.py"], "give the YAML file that names its class"),
        (["resume", "no_such_folder"], "no config.yaml of a run or a comparison"),
        (["new", "configs/digits.yaml"], "expected the name of a Python file"),
        (["problems", "no_such.py"], "there is no file"),
        (["watch", ".", "--port", "99999999"], "should be less than or equal to 65535"),
        (["run", "configs/digits.yaml", "--address", "127.0.0.1:port"], "--address 127.0.0.1:port: nothing answers"),
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


@pytest.mark.parametrize(
    ("called", "words"),
    [
        ("my tools/raybilevel", ["my tools/raybilevel"]),
        ("/site-packages/raybilevel/__main__.py", [sys.executable, "-m", "raybilevel"]),
    ],
)
def test_the_command_to_go_on_is_one_that_a_shell_takes(
    called: str, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [called])
    show_how_to_go_on(Console(), Path("my runs/a;b"))
    assert shlex.split(capsys.readouterr().out) == [*words, "resume", "my runs/a;b"]


def test_resume_takes_the_options_with_which_a_run_began(tmp_path: Path) -> None:
    options = Options("/data", "auto", "s3://bucket/run?scheme=http&region=here")
    keep_options(options, tmp_path / "out")
    assert read_options(tmp_path / "out") == options
    assert read_options(tmp_path) == Options()


def test_a_run_that_goes_on_keeps_the_options_that_it_is_not_given(tmp_path: Path) -> None:
    keep_options(Options("/data", "auto"), tmp_path)
    keep_options(Options(address="ray://head:10001"), tmp_path, resume=True)
    assert read_options(tmp_path) == Options("/data", "ray://head:10001")
    keep_options(Options(), tmp_path)
    assert read_options(tmp_path) == Options()


def test_a_line_is_there_before_anything_slow_is_imported() -> None:
    code = "import sys; sys.modules['torch'] = sys.modules['ray'] = None; import raybilevel.cli as c; " \
        "c.say_what_starts(c.Console(), None)"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.stdout == "starting Ray ...\n", done.stderr


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
