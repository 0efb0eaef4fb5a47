"""What a search learns of a run of Tune that Tune does not tell it: its metric, its constants, its size and its end."""

from __future__ import annotations

import csv
import logging
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from ray import tune
from ray.tune.logger import CSVLoggerCallback
from torch import Tensor, nn

from raybilevel import BilevelSearch, lower_level_trainable, summarise
from raybilevel.errors import ConfigError
from raybilevel.methods._base import UpperResult, UpperStep
from raybilevel.methods._default import Default
from raybilevel.problem import Hyperparameters
from tests.processes import ends
from tests.tiny_problems import Parabola

pytestmark = pytest.mark.usefixtures("local_ray")

SPACE = {"x": {"a": tune.loguniform(1e-4, 1e2)}}


class Scaled(Parabola):
    """A parabola that reads two constants."""

    def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Any) -> Tensor:
        return super().lower_loss(model, hyperparameters, batch) * hyperparameters["scale"] * hyperparameters["unit"]


class Slow(Parabola):
    """Many epochs of gradient descent."""

    epochs = 6

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.5)


class InterruptsAtFour(tune.Stopper):  # type: ignore[misc]
    """Interrupts a run, as Ctrl-C does, when a search, which no pickle of this keeps, has four trainings. Tune then
    waits until its last snapshot is in the storage."""

    search: BilevelSearch | None = None

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        search = type(self).search
        if search is not None and len(search.state.done) >= 4:
            os.kill(os.getpid(), signal.SIGINT)
        return False


@dataclass(frozen=True)
class Endless(Default):
    """Steps never end, and leave the numbers of their processes in a folder."""

    folder: str = ""

    def run(self, problem: Any, space: Any, constants: Any, step: UpperStep, load: Any, memory: Any = None) -> Any:
        Path(self.folder, str(os.getpid())).touch()
        time.sleep(600)
        return UpperResult(None, None)


class OnceAStepRuns(tune.Stopper):  # type: ignore[misc]
    """Ends a run when the process of a step has left its number in a folder."""

    folder: Path | None = None

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        folder = type(self).folder
        return folder is not None and bool(processes_of_steps(folder))


def processes_of_steps(folder: Path) -> list[int]:
    return [int(path.name) for path in folder.iterdir() if path.name.isdigit()]


def tuner(search: BilevelSearch, folder: Path, samples: int, **options: Any) -> tune.Tuner:
    settings = {"metric": "upper_loss", "mode": "min", "reuse_actors": True, **options.pop("tune_config", {})}
    problem = options.pop("problem", search.problem)
    return tune.Tuner(
        tune.with_resources(lower_level_trainable(problem), {"cpu": 1}),
        tune_config=tune.TuneConfig(search_alg=search, num_samples=samples, **settings),
        run_config=tune.RunConfig(storage_path=str(folder), name="run", verbose=0, **options.pop("run_config", {})),
        **options,
    )


@pytest.mark.slow
def test_a_search_with_a_space_of_its_own_hears_of_constants_and_goes_on_in_a_second_experiment(tmp_path: Path) -> None:
    search = BilevelSearch(Scaled(), space={**SPACE, "scale": 1.0}, max_concurrent=2)
    for name in ("one", "two"):
        results = tuner(search, tmp_path / name, 4, param_space={"unit": 1.0}).fit()
        assert not results.errors
        assert {(r.config["scale"], r.config["unit"]) for r in results} == {(1.0, 1.0)}
    assert len(search.state.done) == 8 and len(search.state.steps) > 0
    assert not any(step.failed for step in search.state.steps)
    paths = [search.checkpoint_of(training) for training in search.state.done]
    assert [str(path).startswith(str(tmp_path / "one")) for path in paths] == [True] * 4 + [False] * 4
    assert all(Path(str(path)).exists() for path in paths)


def test_tune_s_metric_reaches_a_search_to_which_it_gives_no_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    search = BilevelSearch(Parabola(), space=SPACE, max_concurrent=2)
    results = tuner(search, tmp_path, 3, tune_config={"metric": "score", "mode": "max"}).fit()
    scores = [result.metrics["score"] for result in results]
    # Without a logger, Tune's snapshot has the results.
    assert not list(tmp_path.rglob("result.json"))
    history = summarise(results)["history"]
    assert sorted(entry["test_loss"] for entry in history) == sorted(r.metrics["test_loss"] for r in results)
    assert sorted(t.upper_loss for t in search.state.measured) == pytest.approx(sorted(-score for score in scores))
    given = BilevelSearch(Parabola(), space=SPACE, metric="upper_loss", mode="min")
    with pytest.raises(ConfigError, match="Tune is given metric='score', mode='max', and this search has 'upper_loss'"):
        tuner(given, tmp_path / "other", 3, tune_config={"metric": "score", "mode": "max"}).fit()
    assert not given.state.trainings


def test_no_step_outlives_a_run_that_a_stopper_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OnceAStepRuns, "folder", tmp_path)
    search = BilevelSearch(Parabola(), method=Endless(folder=str(tmp_path)), max_concurrent=1)
    tuner(search, tmp_path / "storage", 100, param_space=SPACE, run_config={"stop": OnceAStepRuns()}).fit()
    assert 3 <= len(search.state.told) < 100 and search.steps_under_way == 0
    processes = processes_of_steps(tmp_path)
    assert processes and all(ends(process) for process in processes)


def test_a_restored_run_that_is_given_its_space_keeps_its_number_of_trials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tune tells a search of one trial then, after which its steps would be cancelled."""
    search = BilevelSearch(Parabola(), max_concurrent=1)
    monkeypatch.setattr(InterruptsAtFour, "search", search)
    interrupted = tuner(search, tmp_path, 8, param_space=SPACE, run_config={"stop": InterruptsAtFour()}).fit()
    assert 4 <= len(interrupted) < 8

    cancelled: list[tuple[int, int | None]] = []

    def cancel(self: BilevelSearch, timeout: float = 0.0) -> None:
        cancelled.append((len(self.state.told), self._samples))
        upstream(self, timeout)

    upstream = BilevelSearch.cancel_steps
    monkeypatch.setattr(InterruptsAtFour, "search", None)
    monkeypatch.setattr(BilevelSearch, "cancel_steps", cancel)
    trainable = tune.with_resources(lower_level_trainable(Parabola()), {"cpu": 1})
    results = tune.Tuner.restore(str(tmp_path / "run"), trainable, param_space=SPACE).fit()
    assert len(results) == 8 and not results.errors
    assert cancelled and set(cancelled) == {(8, 8)}


@pytest.mark.slow
@pytest.mark.parametrize("resources", [None, {"num_cpus": 0.5}], ids=["workers", "tasks"])
def test_no_step_outlives_a_time_budget(resources: dict[str, float] | None, tmp_path: Path) -> None:
    processes: list[int] = []
    budget = 8.0
    while not processes:  # on a busy machine the first step may begin late
        folder = tmp_path / str(budget)
        folder.mkdir()
        search = BilevelSearch(
            Parabola(), method=Endless(folder=str(folder)), max_concurrent=1, upper_resources=resources
        )
        tuner(search, folder / "storage", 100, param_space=SPACE, tune_config={"time_budget_s": budget}).fit()
        processes = processes_of_steps(folder)
        budget *= 2
    assert search.steps_under_way == 0
    assert all(ends(process) for process in processes)


@pytest.mark.slow
def test_every_training_that_is_stopped_informs_the_search(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    search = BilevelSearch(Slow(), max_concurrent=2)
    tuner(search, tmp_path, 12, param_space=SPACE, run_config={"stop": {"training_iteration": 4}}).fit()
    assert not search.state.done and len(search.state.measured) == 12
    assert {"region", "start"} <= {t.proposal.origin for t in search.state.measured}
    best = search.method.incumbent(search.state)
    assert best is not None and best.upper_loss == min(t.upper_loss for t in search.state.measured)
    assert caplog.text.count("trainings were stopped before their last epoch (Slow.epochs = 6)") == 1


def test_progress_csv_has_the_gradient_and_another_problem_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    search = BilevelSearch(Slow(), max_concurrent=1)
    with caplog.at_level(logging.WARNING):
        results = tuner(
            search, tmp_path, 1, param_space=SPACE, problem=Parabola(), run_config={"callbacks": [CSVLoggerCallback()]}
        ).fit()
    with open(Path(results[0].path) / "progress.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["lower_gradient/x/a"] for row in rows[:-1]] == ["nan"]
    assert float(rows[-1]["lower_gradient/x/a"]) == pytest.approx(results[0].metrics["lower_gradient"]["x"]["a"])
    assert "the Slow of the trainable and that of the search differ" in caplog.text
