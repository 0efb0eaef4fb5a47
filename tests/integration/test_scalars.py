"""What the search knows, through Tune's own loggers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ray import tune

from raybilevel import BilevelSearch, lower_level_trainable
from raybilevel.search_state import SearchState
from raybilevel.tune import _scalars as scalars
from raybilevel.tune._scalars import SearchScalars
from tests.clock import Clock
from tests.tiny_problems import Parabola

KNOWN = {"best_upper_loss", "cost", "trainings", "upper_steps", "multiplier"}


class Longer(Parabola):
    epochs = 12  # long enough for hypergradients to pay


def run(folder: Path, *callbacks: tune.Callback) -> BilevelSearch:
    problem = Longer()
    search = BilevelSearch(problem, max_concurrent=1)
    tune.run(
        lower_level_trainable(problem), config={"x": {"a": tune.loguniform(1e-4, 1e2)}}, search_alg=search,
        metric="upper_loss", mode="min", num_samples=6, reuse_actors=True, verbose=0, storage_path=str(folder),
        name="tune", callbacks=[SearchScalars(search), *callbacks],
    )  # fmt: skip
    return search


def test_tunes_loggers_write_what_the_search_knows(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS")
    search = run(tmp_path)
    last = [json.loads(path.read_text().splitlines()[-1]) for path in (tmp_path / "tune").glob("*/result.json")]
    assert len(last) == 6
    newest = max((result["search"] for result in last), key=lambda found: found["trainings"])
    assert set(newest) >= KNOWN
    told = search.state.told
    assert newest["trainings"] == len(told) - 1  # of those that had ended by then
    assert newest["best_upper_loss"] == pytest.approx(min(t.upper_loss for t in told[:-1]))
    events = sorted((tmp_path / "tune").glob("*/events.out.tfevents*"))
    assert len(events) == 6
    assert any(b"search/best_upper_loss" in path.read_bytes() for path in events)


def test_what_a_search_knows_is_worked_out_when_that_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    search = BilevelSearch(Parabola(), space={"x": {"a": tune.loguniform(1e-4, 1e2)}}, max_concurrent=2)
    worked_out: list[SearchState] = []
    clock = Clock()

    def count(state: SearchState) -> dict[str, float]:
        worked_out.append(state)
        clock.now += 1.0
        return {"cost": float(len(worked_out))}

    monkeypatch.setattr(scalars, "scalars", count)
    callback = SearchScalars(search, clock)
    results: list[dict[str, Any]] = [{} for _ in range(5)]
    for number, result in enumerate(results):
        if number == 2:
            search.suggest("a")
        clock.now += 9.0
        callback.on_trial_result(0, [], None, result)
    assert [result["search"]["cost"] for result in results] == [1.0, 1.0, 1.0, 2.0, 2.0]  # it takes a second in twenty
    assert worked_out == [SearchState(), search.state]


@pytest.mark.filterwarnings("ignore")  # of mlflow
def test_mlflow_keeps_them_too(local_ray: None, tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    from ray.air.integrations.mlflow import MLflowLoggerCallback

    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    run(tmp_path, MLflowLoggerCallback(tracking_uri=store, experiment_name="decays"))
    client = mlflow.MlflowClient(store)
    experiment = client.get_experiment_by_name("decays")
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == 6
    assert all({"upper_loss", "lower_loss", "search/cost"} <= set(found.data.metrics) for found in runs)
    assert any("search/multiplier" in found.data.metrics for found in runs)
    assert all("x/a" in found.data.params for found in runs)


@pytest.mark.filterwarnings("ignore")  # of wandb
def test_weights_and_biases_keeps_them_too(local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    from ray.air.integrations.wandb import WandbLoggerCallback

    monkeypatch.setenv("WANDB_MODE", "offline")  # so that no key is asked for
    run(tmp_path, WandbLoggerCallback(project="decays", mode="offline", dir=str(tmp_path)))
    written = list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert len(written) == 6
    logs = [path.read_bytes() for path in written]
    assert all(b"upper_loss" in log and b"search/cost" in log for log in logs)
    assert any(b"search/multiplier" in log for log in logs)
