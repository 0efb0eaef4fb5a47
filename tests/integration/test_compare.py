"""Comparisons on a real local Ray."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from raybilevel._compare.command import run_all, settled
from raybilevel._compare.config import CompareConfig, Run
from raybilevel._compare.execute import execute
from raybilevel._lower.training import train
from raybilevel._records import store as records
from raybilevel._records.record import Observation, Record, RunStatus
from raybilevel.problems import make_problem

ROOT = Path(__file__).parents[2]
EPOCHS = 24  # long enough for hypergradients to pay
SMALL = {"config": None, "problem": "digits", "options": {"train": 100, "epochs": EPOCHS}, "space": {
    "weight_decay": {name: {"loguniform": [1e-3, 1e2]} for name in ("fc1", "fc2", "fc3")}
}}  # fmt: skip


def comparison(methods: Any, budget: float = 7, **changes: Any) -> CompareConfig:
    problem = {key: value for key, value in SMALL.items() if value is not None}
    content = {"budget": {"trainings": budget}, "seeds": 1, "methods": methods, "problems": {"digits": problem}}
    return CompareConfig.model_validate({**content, **changes})


def check_record(record: Record, budget: float = 7) -> None:
    """What every record of a run that ended holds, whatever the method."""
    assert record.status == "done", record.traceback or record.error
    assert Record.model_validate_json(record.model_dump_json()) == record
    costs = [o.cost for o in record.observations]
    assert costs == sorted(costs) and costs[-1] <= budget + 1e-6
    assert record.spent.epochs == sum(len(trial.epochs) for trial in record.trials)
    assert record.spent.epochs <= budget * EPOCHS
    for trial in record.trials:
        assert len(trial.upper_losses) == len(trial.seconds) == len(trial.epochs)
    done = [o for o in record.observations if o.status == "done"]
    for observed in done:
        curve = next(t for t in record.trials if t.trial == observed.trial)
        assert observed.upper_loss == pytest.approx(curve.upper_losses[-1])
        assert {"test_loss", "test_accuracy"} == set(observed.metrics)
    if done:
        best = record.observations[done[-1].incumbent]
        assert best.upper_loss == min(o.upper_loss for o in done)
        assert record.refits[record.observations.index(best)]["test_loss"] > 0


def empty(run: Run, status: RunStatus = "done", **fields: Any) -> Record:
    return Record(
        kind="comparison", status=status, problem_name=run.problem_name, method_name=run.method_name,
        settings=run.settings, epochs_per_training=1, space=(), **fields,
    )  # fmt: skip


def test_raybilevel_and_random_search_are_counted_alike(local_ray: None) -> None:
    kept: list[Any] = []
    own, random = (
        execute(run, run.plan(), keep=kept.append) for run in comparison(["raybilevel", "random"]).runs(None)
    )
    check_record(own)
    check_record(random)
    assert len(random.observations) == 7
    assert kept[-1].status == "running"  # after every training, for what kills the process
    assert kept[-1].observations == random.observations[: len(kept[-1].observations)]
    assert len(kept[-1].observations) >= 5
    assert random.observations[-1].cost == pytest.approx(7)
    assert own.search is not None and own.overhead is not None and own.machine is not None
    steps = own.search["state"]["steps"]
    assert steps and own.overhead.upper_passes == pytest.approx(sum(s["passes"] for s in steps))
    assert own.spent.epochs < 7 * EPOCHS  # upper-level steps are charged
    assert own.overhead.calls > 0 and own.overhead.upper_seconds > 0
    assert len(own.steps) >= len(steps)
    assert own.machine.cpus == 2
    # The same weights for every method: those of a training in this process from the same seed.
    problem = make_problem("digits", SMALL["options"])
    for record in (own, random):
        first = record.observations[0]
        trained, _ = train(problem, first.hyperparameters, seed=0)
        assert first.upper_loss == pytest.approx(trained.upper_loss, rel=1e-5)  # single precision, threads may differ


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", ["asha", "hyperband", "median-stopping", "pbt", "pb2", "bohb", "optuna", "optuna-gp", "hyperopt",
               "bayesopt", "grid", "raybilevel-paper", "optuna+asha", "raybilevel+asha"],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")  # of the packages themselves
def test_every_method_keeps_to_the_budget(local_ray: None, method: str) -> None:
    (run,) = comparison([method]).runs(None)
    record = execute(run, run.plan())
    if record.status == "unavailable":
        pytest.skip(f"{method}: {record.error}; the extra `compare` has it")
    check_record(record)
    assert record.observations


def test_a_method_that_cannot_be_run_says_why(local_ray: None) -> None:
    many = {name: {"loguniform": [1e-6, 1.0]} for name in (f"g{g}" for g in range(16))}
    problem = {"problem": "digits_logistic", "options": {"groups": 16}, "space": {"weight_decay": many}}
    (run,) = comparison(["grid"], problems={"digits-16": problem}).runs(None)
    record = execute(run, run.plan())
    assert (record.status, record.observations) == ("unavailable", ())
    assert record.error is not None and "65,536" in record.error


def test_a_good_record_is_kept_and_a_damaged_or_failed_one_is_named(tmp_path: Path) -> None:
    run = comparison(["random"], budget=2).runs(None)[0]
    path = tmp_path / run.path
    said: list[str] = []
    assert not settled(path, said.append) and not said
    record = empty(run)
    records.write(path, record)
    assert settled(path, said.append) and not said
    assert run_all([run], tmp_path, None, None, Console(quiet=True)) == (0, False)  # starts no cluster
    whole = path.read_text()
    path.write_text(whole[: len(whole) // 2])
    assert not settled(path, said.append)
    assert path.name in said[-1] and "half-written" in said[-1]
    records.write(path, empty(run, status="failed", error="ValueError: no"))
    assert path.with_name(f"{path.name}.old1").read_text() == whole[: len(whole) // 2]
    assert not settled(path, said.append)
    assert "failed (ValueError: no); it is done again" in said[-1]


def test_what_a_killed_run_has_seen_is_kept_and_named(tmp_path: Path) -> None:
    run = comparison(["random"], budget=2).runs(None)[0]
    path = tmp_path / run.path
    said: list[str] = []
    seen = Observation(status="done", unit=(0.5,), hyperparameters={"a": 1.0}, upper_loss=1.0)
    record = empty(run, status="running", observations=(seen,))
    records.keep(path, record)
    records.keep(path, empty(run, status="running", observations=(seen, seen)))
    assert not settled(path, said.append)
    assert "cut off after 2 trainings" in said.pop()
    assert records.read(path.with_name(f"{path.name}.old1")).observations == (seen, seen)
    assert not settled(path, said.append) and not said
    records.keep(path, record)
    records.write(path, empty(run))
    assert settled(path, said.append) and not said
    assert {other.name for other in path.parent.iterdir()} == {path.name, f"{path.name}.old1"}


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_seen_and_resume_goes_on(tmp_path: Path) -> None:
    import yaml

    config, out = tmp_path / "small.yaml", tmp_path / "out"
    problem = {**{k: v for k, v in SMALL.items() if v is not None}, "options": {"train": 100, "epochs": 30}}
    content = {"budget": {"trainings": 4}, "seeds": 1, "methods": ["random", "grid"], "problems": {"digits": problem}}
    config.write_text(yaml.safe_dump(content))
    command = [sys.executable, "-m", "raybilevel", "compare", str(config), "--out", str(out)]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "COLUMNS": "200"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT
    )
    deadline = time.monotonic() + 400
    while not list(out.glob("records/*/random*.json")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    time.sleep(3)  # within the second run
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 130, stderr
    assert f"raybilevel resume {out}" in stdout and "Traceback" not in stderr
    kept = {path.name: path.read_text() for path in out.glob("records/*/random*.json")}
    other = subprocess.run([*command, "--resume", "--set", "budget.trainings=5"], capture_output=True, text=True,
                           env=environment, cwd=ROOT, check=False)  # fmt: skip
    assert other.returncode == 2 and "differs" in other.stderr
    again = subprocess.run([*command, "--resume"], capture_output=True, text=True, env=environment, cwd=ROOT,
                           timeout=500, check=False)  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert "2 runs, 1 of them have a record" in again.stdout
    assert {path.name: path.read_text() for path in out.glob("records/*/random*.json")} == kept
    assert {json.loads(path.read_text())["status"] for path in out.glob("records/*/*.json")} == {"done"}
    assert re.search(r"^\W*grid\s", again.stdout, re.MULTILINE)  # its row of a table
    third = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert third.returncode == 2 and "already holds a comparison" in third.stderr
