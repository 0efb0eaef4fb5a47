"""What Tune expects of every searcher: of ours and, where Optuna is installed, of Ray's OptunaSearch alike.

Where OptunaSearch is known to do otherwise, the test says so.
"""

from __future__ import annotations

import copy
import importlib.util
import math
import os
import pickle
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler, HyperBandScheduler, MedianStoppingRule
from ray.tune.search import ConcurrencyLimiter, Searcher
from ray.tune.stopper import MaximumIterationStopper, TrialPlateauStopper
from torch import Tensor, nn

from raybilevel import BilevelSearch
from raybilevel.problem import BilevelProblem, Level

Make = Callable[..., Searcher]
METRIC = "upper_loss"


class Anything(BilevelProblem):
    """Reads no hyperparameter: trials are whatever a test makes of their configs."""

    own_loop = True

    def model(self) -> nn.Module:
        return nn.Linear(1, 1)

    def lower_loss(self, model: nn.Module, hyperparameters: Any, batch: Any) -> Tensor:
        return (model.weight - 1).square().sum()

    def upper_loss(self, model: nn.Module, batch: Any) -> Tensor:
        return model.weight.square().sum()

    def batches(self, level: Level, generator: torch.Generator | None) -> Iterator[Any]:
        yield (torch.zeros(1),)


def ours(**options: Any) -> Searcher:
    return BilevelSearch(Anything(), max_concurrent=100, **options)


def optuna(**options: Any) -> Searcher:
    from ray.tune.search.optuna import OptunaSearch

    return OptunaSearch(**options)


@pytest.fixture(
    params=[
        ours,
        pytest.param(
            optuna,
            marks=[
                pytest.mark.skipif(importlib.util.find_spec("optuna") is None, reason="Optuna is not installed"),
                # OptunaSearch reports the last step of a stopped trial twice.
                pytest.mark.filterwarnings("ignore:The reported value is ignored:UserWarning"),
            ],
        ),
    ]
)
def make(request: pytest.FixtureRequest) -> Make:
    found: Make = request.param
    return found


SPACE: dict[str, Any] = {
    "rate": tune.loguniform(1e-4, 1.0),
    "deep": {"momentum": tune.uniform(0, 0.9), "kept": 7},
    "width": tune.choice([16, 32, 64]),
    "kind": tune.choice(["relu", "tanh"]),
    "depth": tune.randint(1, 4),
    "note": "constant",
}


def ready(make: Make, space: dict[str, Any] | None = None, **options: Any) -> Searcher:
    search = make(seed=0, **options)
    assert search.set_search_properties(METRIC, "min", copy.deepcopy(space or SPACE), num_samples=100)
    return search


def result(value: Any, **others: Any) -> dict[str, Any]:
    return {METRIC: value, "lower_loss": 0.0, "training_iteration": 1, **others}


def ask(search: Searcher, trial: str) -> dict[str, Any]:
    found = search.suggest(trial)
    assert isinstance(found, dict)
    return found


def test_suggestions_are_in_the_space_and_nested_as_it_is(make: Make) -> None:
    search = ready(make)
    for number in range(12):
        config = ask(search, f"{number}")
        assert 1e-4 <= config["rate"] <= 1 and 0 <= config["deep"]["momentum"] <= 0.9
        assert config["width"] in (16, 32, 64) and config["kind"] in ("relu", "tanh") and config["depth"] in (1, 2, 3)
        assert config["deep"].get("kept", 7) == 7
        search.on_trial_complete(f"{number}", result(config["rate"]))


def test_the_space_is_set_once_and_not_changed(make: Make) -> None:
    space = copy.deepcopy(SPACE)
    search = make()
    assert search.set_search_properties(METRIC, "min", space)
    assert not search.set_search_properties(METRIC, "min", space)
    assert repr(sorted(space)) == repr(sorted(SPACE)) and set(space["deep"]) == {"momentum", "kept"}


def test_a_known_trial_gets_its_own_configuration_again(make: Make) -> None:
    search = ready(make)
    assert ask(search, "a") == ask(search, "a") != ask(search, "b")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None])
def test_invalid_values_do_not_end_the_search(make: Make, value: Any) -> None:
    search = ready(make)
    for number in range(14):
        config = ask(search, f"{number}")
        bad = number % 3 == 0
        search.on_trial_complete(f"{number}", result(value if bad else config["rate"]))


def test_trials_that_fail_or_end_without_a_word_do_not_end_the_search(make: Make) -> None:
    search = ready(make)
    for number in range(8):
        ask(search, f"{number}")
        search.on_trial_complete(f"{number}", error=number % 2 == 0)
    ask(search, "another")


def test_events_of_unknown_trials_are_ignored(make: Make) -> None:
    search = ready(make)
    if make is optuna:
        pytest.skip("OptunaSearch raises a KeyError")
    search.on_trial_result("stranger", result(1.0))
    search.on_trial_complete("stranger", result(1.0))


def test_the_end_may_be_told_twice(make: Make) -> None:
    search = ready(make)
    ask(search, "a")
    for value in (1.0, 2.0):
        search.on_trial_complete("a", result(value))
    ask(search, "b")


def test_intermediate_results_are_taken(make: Make) -> None:
    search = ready(make)
    for trial in "ab":
        ask(search, trial)
        for step in (1, 2, 3):
            search.on_trial_result(trial, result(1 / step, training_iteration=step))
        search.on_trial_complete(trial, result(0.25, training_iteration=3))
    ask(search, "c")


def test_points_to_evaluate_come_first(make: Make) -> None:
    flat = {"rate": 0.5, "width": 32, "kind": "tanh", "depth": 2}
    nested = {**flat, "deep": {"momentum": 0.25}}
    # OptunaSearch takes flat names only, and drops nested ones without a word.
    points = [{**flat, "deep/momentum": 0.25}] if make is optuna else [nested]
    config = ask(ready(make, points_to_evaluate=points), "a")
    assert config["rate"] == pytest.approx(0.5) and config["deep"]["momentum"] == pytest.approx(0.25)
    assert (config["width"], config["kind"], config["depth"]) == (32, "tanh", 2)


def test_evaluated_points_are_taken(make: Make) -> None:
    search = ready(make)
    point = {"rate": 0.5, "width": 32, "kind": "tanh", "depth": 2, "deep/momentum": 0.25}
    search.add_evaluated_point(point, 1.0, intermediate_values=[3.0, 2.0])
    search.add_evaluated_point({**point, "rate": 0.1}, math.nan, error=True)
    ask(search, "a")


def test_it_pickles_before_and_after_set_up(make: Make) -> None:
    pickle.loads(pickle.dumps(make()))
    search = ready(make)
    ask(search, "a")
    assert ask(pickle.loads(pickle.dumps(search)), "b") == ask(search, "b")


def test_a_fresh_searcher_goes_on_where_a_saved_one_stood(make: Make, tmp_path: Path) -> None:
    search = ready(make)
    for number in range(5):
        config = ask(search, f"{number}")
        if number < 4:
            search.on_trial_complete(f"{number}", result(config["rate"]))
    search.save_to_dir(str(tmp_path), "session")
    fresh = make(seed=0)
    fresh.restore_from_dir(str(tmp_path))
    assert ask(fresh, "next") == ask(search, "next")
    fresh.on_trial_complete("4", result(0.5))  # under way when it was saved


def test_a_limiter_keeps_its_limit(make: Make) -> None:
    limiter = ConcurrencyLimiter(make(seed=0), max_concurrent=2)
    limiter.set_search_properties(METRIC, "min", copy.deepcopy(SPACE))
    assert [limiter.suggest(trial) is not None for trial in "abc"] == [True, True, False]
    limiter.on_trial_complete("a", result(1.0))
    assert limiter.suggest("c") is not None and limiter.suggest("d") is None


def test_mode_max_is_taken(make: Make) -> None:
    search = make(seed=0)
    search.set_search_properties("score", "max", copy.deepcopy(SPACE))
    for number in range(4):
        ask(search, f"{number}")
        search.on_trial_complete(f"{number}", result(1.0, score=float(number)))


def conditional(trial: Any) -> dict[str, Any]:
    if trial.suggest_categorical("kind", ["sgd", "adam"]) == "sgd":
        trial.suggest_float("momentum", 0.0, 0.9)
    for layer in range(trial.suggest_int("depth", 1, 3)):
        trial.suggest_int(f"width{layer}", 8, 64, log=True)
    trial.suggest_float("rate", 1e-4, 1.0, log=True)
    return {"epochs": 3}


def test_a_define_by_run_space_has_what_its_choices_ask_for(make: Make) -> None:
    search = make(space=conditional, metric=METRIC, mode="min", seed=0)
    met: set[str] = set()
    for number in range(20):
        config = ask(search, f"{number}")
        wanted = {"kind", "depth", "rate", *(f"width{layer}" for layer in range(config["depth"]))}
        wanted |= {"momentum"} if config["kind"] == "sgd" else set()
        assert set(config) == wanted | {"epochs"} and config["epochs"] == 3
        search.on_trial_complete(f"{number}", result(config["rate"]))
        met |= wanted
    assert {"momentum", "width2"} <= met


def test_a_define_by_run_space_is_saved_and_goes_on(make: Make, tmp_path: Path) -> None:
    search = make(space=conditional, metric=METRIC, mode="min", seed=0)
    search.on_trial_complete("a", result(ask(search, "a")["rate"]))
    search.save_to_dir(str(tmp_path), "session")
    fresh = make(space=conditional, metric=METRIC, mode="min", seed=0)
    fresh.restore_from_dir(str(tmp_path))
    assert ask(fresh, "b") == ask(search, "b")


# What OptunaSearch refuses.

WIDER: dict[str, Any] = {
    "weights": [tune.uniform(0, 1)] * 3,
    "noise": tune.randn(0, 1),
    "optimizer": tune.choice([{"name": "sgd", "momentum": tune.uniform(0, 0.9)}, None]),
    "half": tune.sample_from(lambda config: config["noise"] / 2),
    "cell": tune.grid_search(["a", "b"]),
    "act": tune.choice([torch.relu, torch.tanh]),
    "constant": (1, {"two": 2}),
}


def check_wider(config: dict[str, Any]) -> None:
    assert len(config["weights"]) == 3 and all(0 <= w <= 1 for w in config["weights"])
    assert config["half"] == config["noise"] / 2
    assert config["cell"] in ("a", "b") and config["act"] in (torch.relu, torch.tanh)
    assert config["optimizer"] is None or config["optimizer"]["name"] == "sgd"


def test_a_wider_space_is_suggested_saved_and_restored(tmp_path: Path) -> None:
    search = ready(ours, WIDER)
    for number in range(6):
        check_wider(ask(search, f"{number}"))
        search.on_trial_complete(f"{number}", result(0.5))
    search.save_to_dir(str(tmp_path), "session")
    fresh = ours(seed=0)  # which knows no space
    fresh.restore_from_dir(str(tmp_path))
    found = [ask(fresh, f"next{number}") for number in range(4)]
    assert found == [ask(search, f"next{number}") for number in range(4)]
    for config in found:
        check_wider(config)
    cells = [search.config_of(training)["cell"] for training in search.state.trainings]  # type: ignore[attr-defined]
    assert cells.count("a") == cells.count("b") == 5


def test_unequal_shares_of_a_grid_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    ours().set_search_properties(METRIC, "min", copy.deepcopy(WIDER), num_samples=5)
    assert "num_samples=5 is shared out among the 2 cells of the grid" in caplog.text


# In runs of Tune.


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    os.environ["RAY_AUTH_MODE"] = "disabled"
    ray.init(address="local", num_cpus=2, include_dashboard=False, configure_logging=False)
    yield
    ray.shutdown()


def trainable(config: dict[str, Any]) -> None:
    for step in range(1, 5):
        time.sleep(config.get("pause", 0.0))
        tune.report(result((config["rate"] - 0.1) ** 2 / step))


def run(search: Searcher, folder: Path, space: dict[str, Any], samples: int, stop: Any = None, **options: Any) -> Any:
    return tune.Tuner(
        trainable,
        param_space=copy.deepcopy(space),
        tune_config=tune.TuneConfig(
            search_alg=search, metric=METRIC, mode="min", num_samples=samples, reuse_actors=True, **options
        ),
        run_config=tune.RunConfig(storage_path=str(folder), name="run", stop=stop, verbose=0),
    ).fit()


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", [AsyncHyperBandScheduler, HyperBandScheduler, MedianStoppingRule])
def test_schedulers_stop_trials_and_the_search_goes_on(
    make: Make, scheduler: Any, local_ray: None, tmp_path: Path
) -> None:
    search = ConcurrencyLimiter(make(seed=0), max_concurrent=2)
    results = run(search, tmp_path, SPACE, 8, scheduler=scheduler(time_attr="training_iteration"))
    assert len(results) == 8 and not results.errors


@pytest.mark.slow
@pytest.mark.parametrize(
    "stop",
    [{"training_iteration": 2}, MaximumIterationStopper(2), TrialPlateauStopper(METRIC, std=1e9, grace_period=1)],
)
def test_stoppers_end_trials(make: Make, stop: Any, local_ray: None, tmp_path: Path) -> None:
    results = run(ConcurrencyLimiter(make(seed=0), max_concurrent=2), tmp_path, SPACE, 5, stop)
    assert len(results) == 5 and all(one.metrics["training_iteration"] < 4 for one in results)


@pytest.mark.slow
def test_a_time_budget_ends_the_run(make: Make, local_ray: None, tmp_path: Path) -> None:
    search = ConcurrencyLimiter(make(seed=0), max_concurrent=2)
    results = run(search, tmp_path, {**SPACE, "pause": 0.5}, 1000, time_budget_s=8)
    assert 0 < len(results) < 1000


@pytest.mark.slow
def test_tune_s_placeholders_are_filled_and_a_restored_run_goes_on(local_ray: None, tmp_path: Path) -> None:
    """Tune hides functions and objects from searchers, and a restored run has no table of them at all."""

    def checked(config: dict[str, Any]) -> None:
        check_wider(config)
        assert config["thing"].epochs == Anything.epochs and config["constant"] == (1, {"two": 2})
        tune.report(result(config["weights"][0]))

    space = {**copy.deepcopy(WIDER), "thing": Anything()}
    tuner = tune.Tuner(
        checked,
        param_space=space,
        tune_config=tune.TuneConfig(search_alg=ours(seed=0), metric=METRIC, mode="min", num_samples=4),
        run_config=tune.RunConfig(storage_path=str(tmp_path), name="run", verbose=0),
    )
    results = tuner.fit()
    assert len(results) == 4 and not results.errors
    again = tune.Tuner.restore(str(tmp_path / "run"), checked, param_space=space).fit()
    assert len(again) == 4 and not again.errors
