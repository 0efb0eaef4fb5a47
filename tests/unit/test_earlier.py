"""Points that are known from earlier work."""

from __future__ import annotations

import json
import logging
import math
import threading
from pathlib import Path
from typing import Any

import pytest
from ray import tune

from raybilevel import BilevelSearch
from raybilevel.errors import ConfigError, DataError, SpaceError, StateError
from raybilevel.methods import Default
from raybilevel.search import BilevelOptimizer
from raybilevel.tune._domains import split_param_space
from raybilevel.tune._earlier import Evaluated, take
from raybilevel.tune._results import Objective
from raybilevel.tune._saved_space import pack, unpack
from tests.tiny_problems import Parabola

SPACE = {"x": {"a": tune.loguniform(1e-4, 1e2)}}


def experiment(folder: Path, *trials: tuple[str, Any, dict[str, Any]]) -> Path:
    """What Tune leaves of an experiment: of each trial its status, its config and its last result."""
    data = [
        [json.dumps({"trial_id": str(i), "status": status, "config": config}), json.dumps({"last_result": result})]
        for i, (status, config, result) in enumerate(trials)
    ]
    (folder / "experiment_state-2026-01-01_00-00-00.json").write_text(json.dumps({"trial_data": data}))
    return folder


def known(search: BilevelSearch) -> list[tuple[float, float]]:
    """The points of the model of F, and F there."""
    return [(round(search.config_of(t)["x"]["a"], 9), t.upper_loss) for t in search.state.measured]


def test_trials_of_any_searcher_that_ended_well_are_points_of_the_model_of_f(tmp_path: Path) -> None:
    folder = experiment(
        tmp_path,
        ("TERMINATED", {"x": {"a": 0.1}, "width": 8}, {"val": {"loss": 0.3}}),
        ("ERROR", {"x": {"a": 0.2}}, {"val": {"loss": 0.1}}),
        ("TERMINATED", {"x": {"a": 0.5}}, {"val": {"loss": math.nan}}),
        ("TERMINATED", {"x": {"a": 1.0}}, {"val": {"loss": 0.2}, "lower_level_finished": False}),
        ("RUNNING", {"x": {"a": 2.0}}, {"val": {"loss": 0.2}}),
        ("TERMINATED", {"x": {"a": 10.0}}, {"val": {"loss": 0.7}}),
    )
    search = BilevelSearch.from_experiment(folder, Parabola(), reported_as="val/loss", seed=3)
    assert search.seed == 3 and not search.state.trainings  # until Tune tells the space
    assert search.set_search_properties("upper_loss", "min", SPACE)
    assert known(search) == [(0.1, 0.3), (10.0, 0.7)]
    # They are no trainings: nothing is known of f, and the first trial is training 1.
    assert search.state.best is None and search.state.cost == 0
    assert search.suggest("first") is not None
    assert [search.state.number(t) for t in search.state.trainings] == [0, 0, 1]


def test_trials_elsewhere_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    inside, outside = {"x": {"a": 0.1}}, {"x": {"a": 1e9}}
    folder = experiment(tmp_path, *(("TERMINATED", config, {"upper_loss": 1.0}) for config in (outside, inside, {})))
    with caplog.at_level(logging.WARNING):
        search = BilevelSearch.from_experiment(folder, Parabola(), space=SPACE)
    assert known(search) == [(0.1, 1.0)]
    assert "2 of 3 earlier trials do not lie in the space" in caplog.text
    experiment(tmp_path, ("TERMINATED", outside, {"upper_loss": 1.0}))
    with pytest.raises(SpaceError, match=r"none of 1 earlier trials lies in the space.*x/a"):
        BilevelSearch.from_experiment(folder, Parabola(), space=SPACE)


def test_trials_of_a_space_with_lists_and_alternatives_are_known() -> None:
    optimizers = [{"name": "adam"}, {"name": "sgd", "momentum": tune.uniform(0, 1)}]
    space, _ = split_param_space({"w": [tune.uniform(0, 1), 3], "o": tune.choice(optimizers)})
    configs: list[dict[str, Any]] = [
        {"w": [0.5, 3], "o": {"name": "adam"}}, {"w": [0.25, 3], "o": {"name": "sgd", "momentum": 0.75}}
    ]  # fmt: skip
    optimizer = BilevelOptimizer(space, Default())
    take(optimizer, [Evaluated({**config, "width": 8}, 1.0) for config in configs], Objective())
    assert [optimizer.config_of(t) for t in optimizer.state.measured] == configs


def test_what_an_experiment_lacks_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not the folder of a Tune experiment"):
        BilevelSearch.from_experiment(tmp_path, Parabola())
    folder = experiment(tmp_path, ("TERMINATED", {"x": {"a": 0.1}}, {"val_loss": 0.3, "name": "a"}))
    with pytest.raises(ConfigError, match=r"no trial reported 'upper_loss'.*they reported val_loss.*reported_as"):
        BilevelSearch.from_experiment(folder, Parabola())


def test_rewards_of_points_that_need_no_training() -> None:
    points = [{"x": {"a": 0.1}}, {"x": {"a": 1.0}}]
    search = BilevelSearch(Parabola(), SPACE, points_to_evaluate=points, evaluated_rewards=[0.5, 0.25])
    assert known(search) == [(0.1, 0.5), (1.0, 0.25)]
    asked = search.suggest("first")
    assert isinstance(asked, dict) and asked not in points
    with pytest.raises(ConfigError, match="of each of 2 points_to_evaluate, got 1"):
        BilevelSearch(Parabola(), SPACE, points_to_evaluate=points, evaluated_rewards=[0.5])
    with pytest.raises(ConfigError, match="expected finite numbers"):
        BilevelSearch(Parabola(), SPACE, points_to_evaluate=points, evaluated_rewards=[0.5, math.nan])


def test_what_earlier_trials_say_of_constrained_metrics_is_known(tmp_path: Path) -> None:
    folder = experiment(
        tmp_path,
        ("TERMINATED", {"x": {"a": 0.1}}, {"upper_loss": 0.3, "size": 3.0}),
        ("TERMINATED", {"x": {"a": 1.0}}, {"upper_loss": 0.2}),
    )
    search = BilevelSearch.from_experiment(folder, Parabola(), space=SPACE, constraints={"size": "<= 2"})
    search.add_evaluated_point({"x": {"a": 10.0}}, 0.1)
    excesses = [t.excesses[0] for t in search.state.measured]
    assert excesses == pytest.approx([0.5, math.nan, math.nan], nan_ok=True)
    assert not any(t.feasible for t in search.state.measured)


class Scaled(Parabola):
    def lower_loss(self, model: Any, hyperparameters: Any, batch: Any) -> Any:
        return hyperparameters["scale"] * super().lower_loss(model, hyperparameters, batch)


def test_constants_of_tune_reach_a_search_that_knows_points_already() -> None:
    search = BilevelSearch(
        Scaled(), space={**SPACE, "scale": 1.0}, points_to_evaluate=[{"x": {"a": 0.1}}], evaluated_rewards=[0.3]
    )
    search.set_search_properties("upper_loss", "min", {"other": 2.0}, num_samples=3)
    assert search.constants == {"scale": 1.0, "other": 2.0}
    assert known(search) == [(0.1, 0.3)]


def test_a_space_that_could_not_be_saved_is_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    search = BilevelSearch(Scaled(), space={**SPACE, "scale": 1.0})
    text = pack(search.space, {"lock": threading.Lock()})
    assert "the space cannot be saved with the search" in caplog.text
    assert text is not None
    with pytest.raises(StateError, match="give the space to BilevelSearch"):
        unpack(text)


def test_a_study_of_optuna() -> None:
    optuna = pytest.importorskip("optuna", reason="the extra `bench` is not installed")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="minimize")
    for value, loss in ((0.1, 0.3), (10.0, 0.7)):
        distribution = optuna.distributions.FloatDistribution(1e-4, 1e2, log=True)
        study.add_trial(
            optuna.trial.create_trial(params={"x/a": value}, distributions={"x/a": distribution}, value=loss)
        )
    study.add_trial(optuna.trial.create_trial(state=optuna.trial.TrialState.FAIL))
    assert known(BilevelSearch.from_study(study, Parabola(), space=SPACE)) == [(0.1, 0.3), (10.0, 0.7)]
    with pytest.raises(ConfigError, match="direction is minimize, and this search is of mode 'max'"):
        BilevelSearch.from_study(study, Parabola(), metric="score", mode="max")
    several = optuna.create_study(directions=["minimize", "maximize"])
    with pytest.raises(ConfigError, match="direction is minimize, maximize"):
        BilevelSearch.from_study(several, Parabola())
