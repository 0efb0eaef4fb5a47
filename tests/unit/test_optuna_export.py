"""A run as a study of Optuna."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from raybilevel import cli
from raybilevel._config.experiment import ExperimentConfig, SearchConfig
from raybilevel._records import store as records
from raybilevel._records.record import Hyperparameter, Observation, Record, Settings, TrialLog
from raybilevel._records.run_folder import record_of, settings_of
from raybilevel.errors import ConfigError
from raybilevel.methods import make_method
from raybilevel.search import _state_file as state_file
from raybilevel.search._optimizer import BilevelOptimizer
from raybilevel.search_state import Proposal, SearchState, Training
from raybilevel.space import Parameter, Space


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    def observation(number: int, rate: float, **known: object) -> Observation:
        values = {"lr": {"head": rate}}
        return Observation.model_validate(
            {"number": number, "trial": f"t{number}", "unit": (0.5,), "hyperparameters": values, **known}
        )

    record = Record(
        kind="comparison", status="done", problem_name="p", method_name="random", metric="-accuracy",
        settings=Settings(problem="p", options={}, method="random", seed=3, budget=3), epochs_per_training=2,
        space=(Hyperparameter(name="lr/head", low=1e-3, high=1.0, log=True),),
        observations=(
            observation(1, 0.1, status="done", upper_loss=-0.8, metrics={"test_loss": 0.5}, cost=1.0),
            observation(2, 1.0 + 1e-12, status="stopped", stopped_upper_loss=-0.3),
            observation(3, 0.2, status="failed"),
        ),
        trials=(TrialLog(trial="t1", seconds=(1.0, 2.0), took=(1.0, 1.0), epochs=(1, 2), upper_losses=(0.7, 0.8)),),
    )  # fmt: skip
    records.write(tmp_path / "records" / "p" / "random.json", record)
    return tmp_path


def test_trainings_are_trials(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    optuna = pytest.importorskip("optuna", reason="optuna is not installed")
    path = folder / "optuna.db"
    cli.export(folder, path)
    assert capsys.readouterr().out == f"{path}: study 'p, random, seed 3'\n"
    study = optuna.load_study(study_name="p, random, seed 3", storage=f"sqlite:///{path}")
    done, stopped, failed = study.trials
    assert (study.direction.name, study.metric_names) == ("MAXIMIZE", ["accuracy"])
    assert [t.state.name for t in study.trials] == ["COMPLETE", "PRUNED", "FAIL"]
    assert (done.value, done.params, done.intermediate_values) == (0.8, {"lr/head": 0.1}, {1: 0.7, 2: 0.8})
    assert done.user_attrs == {"training": 1, "cost": 1.0, "test_loss": 0.5}
    assert stopped.params == {"lr/head": 1.0} and failed.value is None
    assert done.distributions["lr/head"] == optuna.distributions.FloatDistribution(1e-3, 1.0, log=True)
    assert (done.datetime_complete - done.datetime_start).total_seconds() == pytest.approx(2.0)
    assert study.best_trial.number == 0
    with pytest.raises(ConfigError, match=r"optuna\.db exists; name a file that does not"):
        cli.export(folder, path)


def test_choices_and_conditions_are_kept(tmp_path: Path) -> None:
    optuna = pytest.importorskip("optuna", reason="optuna is not installed")
    widths = Parameter.of(("widths",), "choice", [(8, 8), (64,)])
    degree = replace(Parameter.of(("degree",), "randint", [1, 6]), when=(((0, 1),),))
    space = Space((widths, degree))
    points = [(0.0, 0.0), space.rounded(torch.tensor([1.0, 0.5], dtype=torch.double)).tolist()]
    trainings = tuple(
        Training(n, Proposal(tuple(point), "start"), "done", n, lower_loss=1.0, upper_loss=2.0 - n)
        for n, point in enumerate(points)
    )
    saved = state_file.SavedSearch(
        **{**vars(BilevelOptimizer(space, make_method("default"), seed=0).saved()), "state": SearchState(trainings)},
        metric="upper_loss", mode="min", constants="{}", checkpoints={},
    )  # fmt: skip
    record = record_of(settings_of(ExperimentConfig(problem="ridge", search=SearchConfig(trainings=2))), saved, {}, {})
    records.write(tmp_path / "records" / "ridge" / "default.json", record)
    cli.export(tmp_path, tmp_path / "optuna.db")
    first, second = optuna.load_study(study_name=None, storage=f"sqlite:///{tmp_path / 'optuna.db'}").trials
    assert first.params == {"widths": "(8, 8)"}
    assert second.params == {"widths": "(64,)", "degree": 3}


def test_an_export_without_optuna_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"pip install 'raybilevel\[optuna\]'"):
        cli.export(folder, folder / "optuna.db")


def test_a_folder_that_is_not_there_is_named(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"--to .*optuna\.db: there is no folder .*nowhere; make it"):
        cli.export(folder, folder / "nowhere" / "optuna.db")
    with pytest.raises(ConfigError, match=r"optuna\.db: there is no folder"):
        cli.export(folder, Path("nowhere/optuna.db"))
