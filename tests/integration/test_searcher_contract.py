"""What Tune may do to a searcher, in whatever order; no cluster is needed for it."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.fs
import pytest
import ray
from ray import tune
from ray.tune.search import ConcurrencyLimiter, Searcher

from raybilevel import BilevelSearch
from raybilevel.errors import ConfigError, RaybilevelError, SpaceError
from raybilevel.methods import Default
from raybilevel.methods._trust_region import TrustRegionRule
from raybilevel.search._state_file import FORMAT, read
from raybilevel.tune import _lost_trials as lost_trials
from raybilevel.tune._checkpoints import Checkpoints
from tests.tiny_problems import Parabola

SPACE: dict[str, Any] = {"x": {"a": tune.loguniform(1e-4, 1e2)}, "note": "constant", "deep": {"size": 3}}


def ready(max_concurrent: int = 4, **options: Any) -> BilevelSearch:
    search = BilevelSearch(Parabola(), max_concurrent=max_concurrent, **options)
    assert search.set_search_properties("upper_loss", "min", SPACE)
    return search


def result(upper: float = 1.0, finished: bool = True, **others: Any) -> dict[str, Any]:
    return {
        "upper_loss": upper, "lower_loss": 0.5, "lower_gradient/x/a": 0.25, "lower_passes": 3.0,
        "lower_level_finished": finished, "trial_path": "/storage/trial", "checkpoint_dir_name": "checkpoint_000001",
        **others,
    }  # fmt: skip


def test_the_space_is_set_once_and_not_changed() -> None:
    space = copy.deepcopy(SPACE)
    search = BilevelSearch(Parabola())
    assert search.set_search_properties("upper_loss", "min", space)
    assert not search.set_search_properties("upper_loss", "min", space)
    assert set(space) == set(SPACE)
    assert not BilevelSearch(Parabola(), space=SPACE).set_search_properties("upper_loss", "min", SPACE)
    with pytest.raises(Exception, match="no search space"):
        BilevelSearch(Parabola()).suggest("t")


def test_suggestions_hold_what_is_searched_and_nothing_else() -> None:
    suggestion = ready().suggest("t")
    assert isinstance(suggestion, dict)
    assert set(suggestion) == {"x"}
    assert 1e-4 <= suggestion["x"]["a"] <= 1e2
    assert type(suggestion["x"]["a"]) is float


def test_results_stay_with_their_trials_in_any_order() -> None:
    search = ready()
    asked = {trial: search.suggest(trial) for trial in "abc"}
    for trial, upper in (("c", 3.0), ("a", 1.0), ("b", 2.0)):
        search.on_trial_result(trial, result(upper))
        search.on_trial_complete(trial_id=trial, result=result(upper), error=False)
    found = {t.upper_loss: search.config_of(t) for t in search.state.done}
    assert found == {1.0: asked["a"], 2.0: asked["b"], 3.0: asked["c"]}
    assert search.checkpoint_of(search.state.done[0]) == "/storage/trial/checkpoint_000001"


def test_what_was_reported_counts_where_a_trial_ends_without_a_word() -> None:
    """Tune says no more than that it has ended where a scheduler stops it while it is paused, or its process dies."""
    search = ready()
    ends = {"a": (True, False), "b": (False, False), "c": (True, True), "d": (False, True)}
    for trial in ends:
        search.suggest(trial)
    for trial, (finished, error) in ends.items():
        search.on_trial_result(trial, result(2.0, finished))
        search.on_trial_complete(trial, error=error)
    assert [t.status for t in search.state.trainings] == ["done", "stopped", "done", "failed"]
    assert [t.upper_loss for t in search.state.trainings[:3]] == [2.0] * 3
    assert search.checkpoint_of(search.state.done[0]) is not None


def test_late_repeated_and_unknown_events_change_nothing() -> None:
    search = ready()
    search.suggest("a")
    search.on_trial_complete("a", result(1.0))
    before = search.state
    search.on_trial_complete("a", result(5.0))
    search.on_trial_complete("a", error=True)
    search.on_trial_complete("never suggested", result(0.0))
    search.on_trial_result("never suggested", result(0.0))
    assert search.state == before
    assert search.suggest("a") is not None  # a known id gets its own configuration again


@pytest.mark.parametrize(
    ("last", "error", "status"),
    [
        (None, True, "failed"),
        (None, False, "failed"),  # stopped while pending
        (result(float("nan")), False, "failed"),
        (result(float("inf")), False, "failed"),
        (result(1.0, lower_loss=float("nan")), False, "failed"),
        ({"score": 1.0}, False, "failed"),  # another trainable
        (result(1.0, finished=False), False, "stopped"),
        (result(1.0), False, "done"),
    ],
)
def test_how_a_trial_can_end(last: dict[str, Any] | None, error: bool, status: str) -> None:
    search = ready()
    search.suggest("a")
    search.on_trial_complete("a", last, error=error)
    assert search.state.trainings[0].status == status


def test_the_gradient_is_turned_into_the_unit_cube() -> None:
    search = ready()
    suggestion = search.suggest("a")
    search.on_trial_complete("a", result())
    # d f / d unit = df/dx * x * ln(high / low), with six decades
    assert search.state.done[0].lower_gradient[0] == pytest.approx(0.25 * suggestion["x"]["a"] * 13.815510557964274)


def test_it_pickles_before_and_after_set_up() -> None:
    assert pickle.loads(pickle.dumps(BilevelSearch(Parabola()))).state.trainings == ()
    search = ready()
    search.suggest("a")
    copied = pickle.loads(pickle.dumps(search))
    assert repr(copied.state) == repr(search.state)  # NaN is not equal to itself
    assert copied.suggest("b") == search.suggest("b")


def test_a_fresh_searcher_goes_on_where_a_saved_one_stood(tmp_path: Path) -> None:
    search = ready(seed=5)
    for trial in "ab":
        search.suggest(trial)
    search.on_trial_complete("a", result(1.0))
    search.save_to_dir(str(tmp_path), "session")
    fresh = BilevelSearch(Parabola())
    fresh.restore_from_dir(str(tmp_path))
    assert repr(fresh.state) == repr(search.state)
    assert fresh.suggest("c") == search.suggest("c")
    fresh.on_trial_complete("b", result(2.0))  # in flight when it was saved
    assert [t.upper_loss for t in fresh.state.done] == [1.0, 2.0]
    assert fresh.metric == "upper_loss"
    assert fresh.constants == {"note": "constant", "deep": {"size": 3}}


@pytest.mark.parametrize("damage", ["truncated", "tampered", "another method"])
def test_a_state_that_cannot_be_used_is_reported_and_not_raised(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    search = ready(method="paper") if damage == "another method" else ready()
    search.suggest("a")
    path = tmp_path / "state"
    search.save(str(path))
    text = path.read_text()
    if damage == "truncated":
        path.write_text(text[:-20])
    if damage == "tampered":
        path.write_text(text.replace("pending", "failed"))
    fresh = BilevelSearch(Parabola())
    with caplog.at_level(logging.ERROR):
        fresh.restore(str(path))  # Tune would go on with a single trial if this raised
    assert "begins anew" in caplog.text
    assert fresh.set_search_properties("upper_loss", "min", SPACE)


def test_no_more_trials_are_under_way_than_slots() -> None:
    search = ready(max_concurrent=1)
    assert search.suggest("a") == search.suggest("a") is not None
    assert search.suggest("b") is None
    search.on_trial_complete("a", error=True)
    assert search.suggest("b") is not None


def test_a_concurrency_limiter_leaves_the_limit_to_the_search() -> None:
    """Restored from a file older than the search's, its own list of live trials would drop results and stay full."""
    search = BilevelSearch(Parabola(), max_concurrent=4)
    limiter = ConcurrencyLimiter(search, max_concurrent=2)
    limiter.set_search_properties("upper_loss", "min", SPACE)
    assert [limiter.suggest(trial) is not None for trial in "abc"] == [True, True, False]
    limiter.set_state({**limiter.get_state(), "live_trials": {"x", "y"}})
    limiter.on_trial_complete("a", result(1.0))
    assert [t.status for t in search.state.trainings] == ["done", "pending"]
    assert limiter.suggest("c") is not None


def test_trials_that_nobody_runs_are_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search = ready(max_concurrent=1)
    lost = search.suggest("lost")
    search.save(str(tmp_path / "state"))
    fresh = BilevelSearch(Parabola(), max_concurrent=1)
    fresh.restore(str(tmp_path / "state"))
    assert fresh.suggest("new") is None
    monkeypatch.setattr(lost_trials, "IDLE_POLL_PERIOD_S", -1.0)  # as if Tune had waited a second before each
    answers = [fresh.suggest("new") for _ in range(lost_trials.IDLE_POLLS + 1)]
    assert not any(answers[:-1])
    assert answers[-1] is not None and lost is not None
    assert answers[-1]["x"] == lost["x"]
    assert fresh.suggest("another") is None
    fresh.on_trial_complete("lost", result(1.0))  # it was alive after all: nothing that is observed is lost
    assert len(fresh.state.done) == 1


def test_a_resumed_trial_of_which_nothing_is_heard_does_not_hold_its_slot(tmp_path: Path) -> None:
    search = ready(max_concurrent=2)
    for trial in "ab":
        search.suggest(trial)
    search.save(str(tmp_path / "state"))
    fresh = BilevelSearch(Parabola(), max_concurrent=2, space=SPACE)
    fresh.restore(str(tmp_path / "state"))
    fresh.on_trial_result("a", result(2.0, finished=False))
    for number in range(7):  # "a" goes on, while others come and go in the other slot
        fresh._ready().adopt(str(number), {"x": {"a": 0.1 * (number + 1)}})
        fresh.on_trial_complete(str(number), error=True)
    fresh.suggest("new")
    assert [t.status for t in fresh.state.trainings[:2]] == ["pending", "lost"]


def test_resumed_trials_that_wait_for_one_of_fewer_slots_are_not_lost(tmp_path: Path) -> None:
    search = ready(max_concurrent=8)
    trials = "abcdefgh"
    for trial in trials:
        search.suggest(trial)
    search.save(str(tmp_path / "state"))
    fresh = BilevelSearch(Parabola(), max_concurrent=1, space=SPACE)
    fresh.restore(str(tmp_path / "state"))
    for trial in trials[:-1]:
        assert fresh.suggest("new") is None
        fresh.on_trial_complete(trial, error=True)
    assert fresh.state.trainings[-1].status == "pending"


def test_a_second_run_with_one_searcher_knows_that_the_first_is_over() -> None:
    search = BilevelSearch(Parabola(), space=SPACE, max_concurrent=4)
    search.set_search_properties("upper_loss", "min", {}, num_samples=2)
    first = [search.suggest(trial) for trial in "ab"]
    search.on_trial_complete("a", error=True)  # "b" was interrupted
    search.set_search_properties("upper_loss", "min", {}, num_samples=2)
    assert search.suggest("c") == first[1]
    cancelled: list[float] = []
    search.cancel_steps = cancelled.append  # type: ignore[method-assign,assignment]
    search.on_trial_complete("c", error=True)
    assert not cancelled


def test_a_state_of_another_space_is_refused_and_constants_stay_as_they_were_given(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    space = {**SPACE, "shape": (3, 3)}
    search = BilevelSearch(Parabola(), space=space)
    search.suggest("a")
    search.save(str(tmp_path / "state"))
    same = BilevelSearch(Parabola(), space=space)
    same.restore(str(tmp_path / "state"))
    assert len(same.state.trainings) == 1
    assert same.constants["shape"] == (3, 3)
    other = BilevelSearch(Parabola(), space={**space, "x": {"a": tune.loguniform(1e-4, 1e1)}})
    with caplog.at_level(logging.ERROR):
        other.restore(str(tmp_path / "state"))
    assert "the state is of the space" in caplog.text
    assert not other.state.trainings


def test_a_run_in_which_no_trial_says_what_the_search_needs_is_stopped() -> None:
    search = ready(max_concurrent=1)
    search.suggest("a")
    search.on_trial_complete("a", {"upper_loss": 1.0})
    with pytest.raises(RaybilevelError, match=r"no 'lower_loss'.*Repeater"):
        search.suggest("b")


def test_stops_before_every_last_epoch_are_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    search = ready(max_concurrent=1)
    for number in range(6):
        assert search.suggest(f"{number}") is not None
        search.on_trial_complete(f"{number}", result(1.0, finished=False))
        warned = caplog.text.count("were stopped before their last epoch (Parabola.epochs = 2), and none ran to it")
        assert warned == (number >= 2)


@pytest.mark.parametrize("value", [None, "high", [0.1, 0.2]])
@pytest.mark.parametrize("name", ["upper_loss", "lower_loss"])
def test_a_metric_that_is_no_number_is_a_failure_that_is_named(
    name: str, value: Any, caplog: pytest.LogCaptureFixture
) -> None:
    search = ready()
    search.suggest("a")
    search.on_trial_complete("a", {**result(), name: value})
    assert search.state.trainings[0].status == "failed"
    assert f"trial a reported {name} = {value!r}; report a number." in caplog.text
    assert search.suggest("b") is not None


def test_a_result_of_another_config_counts_where_it_was_trained(caplog: pytest.LogCaptureFixture) -> None:
    search = ready()
    asked = search.suggest("a")
    assert isinstance(asked, dict)
    search.on_trial_complete("a", result(0.25, config={**SPACE, "x": {"a": 2.0}}))
    (training,) = search.state.done
    assert search.config_of(training)["x"]["a"] == pytest.approx(2.0)
    assert search.config_of(training) != asked
    assert "trial a was trained at" in caplog.text and "its result counts there" in caplog.text
    search.suggest("b")
    search.on_trial_complete("b", result(0.25, config={**SPACE, "x": {"a": 1e9}}))
    assert search.state.trainings[1].status == "failed"
    caplog.clear()
    same = search.suggest("c")
    assert isinstance(same, dict)
    search.on_trial_complete("c", result(0.25, config={**SPACE, **same}))
    assert search.state.trainings[2].status == "done" and "was trained at" not in caplog.text


def test_metrics_that_evaluate_does_not_return_are_said_before_a_training(caplog: pytest.LogCaptureFixture) -> None:
    for metric, bounds, lacking in (
        ("upper_loss", {}, None),
        ("lower_loss", {}, None),
        ("score", {"test_loss": "<= 5"}, None),
        ("accuracy", {"score": ">= -1", "latency_ms": "<= 5"}, "accuracy, latency_ms"),
    ):
        caplog.clear()
        search = BilevelSearch(Parabola(), constraints=bounds)
        search.set_search_properties(metric, "min", {"x": {"a": tune.loguniform(1e-4, 1e2)}})
        said = [record.getMessage() for record in caplog.records if "evaluate" in record.getMessage()]
        assert said == [] if lacking is None else f"Parabola.evaluate does not return {lacking}, which" in said[0]


def test_tune_s_metric_reaches_a_search_that_was_given_its_space() -> None:
    search = BilevelSearch(Parabola(), space=SPACE, max_concurrent=2)
    search.set_search_properties("score", "max", {})
    search.suggest("a")
    search.on_trial_complete("a", result(1.0, score=0.5))
    assert search.state.measured[0].upper_loss == -0.5
    with pytest.raises(ConfigError, match="Tune is given metric='upper_loss', mode='min', and this search has 'score'"):
        search.set_search_properties("upper_loss", "min", {})
    with pytest.raises(ConfigError, match=r"this search has 'upper_loss', 'min'; give both the same"):
        BilevelSearch(Parabola(), space=SPACE, metric="upper_loss").set_search_properties("score", "max", {})


def test_numbers_of_numpy_are_points() -> None:
    search = ready(points_to_evaluate=[{"x": {"a": np.float32(0.5)}}])
    suggestion = search.suggest("a")
    assert isinstance(suggestion, dict)
    assert suggestion["x"]["a"] == pytest.approx(0.5) and type(suggestion["x"]["a"]) is float
    search.add_evaluated_point({"x/a": np.float32(0.25)}, 1.0)
    assert search.config_of(search.state.measured[0])["x"]["a"] == pytest.approx(0.25)


def test_a_search_without_a_space_raises_what_ray_s_own_do() -> None:
    with pytest.raises(RuntimeError, match="no search space yet"):
        BilevelSearch(Parabola()).suggest("a")


# Restoring beside Tune's own snapshot.


def snapshot_of(folder: Path, *trials: tuple[str, str, dict[str, Any], dict[str, Any]]) -> None:
    """A snapshot as Tune writes it: a trial's state and its metadata are JSON within JSON."""
    data = [
        (json.dumps({"trial_id": trial, "status": status, "config": config}), json.dumps({"last_result": last}))
        for trial, status, config, last in trials
    ]
    (folder / "experiment_state-1.json").write_text(json.dumps({"trial_data": data}))


def config_of(search: BilevelSearch, trial: str) -> dict[str, Any]:
    return {**search._ready().config(trial), "note": "constant", "deep": {"size": 3}}


@pytest.mark.parametrize("damage", ["truncated", "tampered", "of another version", "empty"])
def test_the_last_good_state_is_used_and_no_observation_is_lost(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    search = ready(seed=5)
    for trial in "abc":
        search.suggest(trial)
    search.on_trial_complete("a", result(1.0))
    search.save_to_dir(str(tmp_path), "1")
    search.on_trial_complete("b", result(2.0))
    search.save_to_dir(str(tmp_path), "1")
    newest = tmp_path / "searcher-state-1.pkl"
    text = newest.read_text()
    changed = {
        "truncated": text[:-20], "tampered": text.replace("pending", "failed"), "empty": "",
        "of another version": text.replace(f'"format": {FORMAT}', '"format": 7'),
    }  # fmt: skip
    assert changed[damage] != text
    newest.write_text(changed[damage])
    nested = {**result(2.0), "lower_gradient": {"x": {"a": 0.25}}}
    snapshot_of(
        tmp_path,
        ("a", "TERMINATED", config_of(search, "a"), result(1.0)),
        ("b", "TERMINATED", config_of(search, "b"), nested),
        ("c", "RUNNING", config_of(search, "c"), {}),
    )
    fresh = ready(seed=5)
    with caplog.at_level(logging.WARNING):
        fresh.restore_from_dir(str(tmp_path))
    assert "searcher-state-1.pkl cannot be used" in caplog.text
    assert "older state" in caplog.text
    assert "1 trials or results were taken over" in caplog.text
    assert repr(fresh.state) == repr(search.state)
    assert fresh.checkpoint_of(fresh.state.done[1]) == search.checkpoint_of(search.state.done[1])


def test_with_no_state_left_the_observations_come_from_the_snapshot(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    search = ready(seed=5)
    for trial in "abc":
        search.suggest(trial)
    search.on_trial_complete("a", result(1.0, timestamp=7))
    search.on_trial_complete("b", error=True)
    (tmp_path / "searcher-state-1.pkl").write_bytes(b"")
    snapshot_of(
        tmp_path,
        ("a", "TERMINATED", config_of(search, "a"), result(1.0, timestamp=7)),
        ("b", "ERROR", config_of(search, "b"), result(5.0, finished=False, timestamp=8)),
        ("c", "PENDING", config_of(search, "c"), {}),
        ("elsewhere", "TERMINATED", {"x": {"a": 1e9}}, result(1.0)),
    )
    fresh = ready(seed=5)
    with caplog.at_level(logging.WARNING):
        fresh.restore_from_dir(str(tmp_path))
    assert "begins anew" in caplog.text
    assert repr(fresh.state) == repr(search.state)
    assert fresh.suggest("d") == search.suggest("d")


def test_a_state_newer_or_older_than_the_snapshot_agrees_with_it_afterwards(tmp_path: Path) -> None:
    search = ready(seed=5)
    for trial in "ab":
        search.suggest(trial)
    search.on_trial_complete("a", result(1.0))
    search.save_to_dir(str(tmp_path), "1")
    snapshot_of(tmp_path, ("a", "RUNNING", config_of(search, "a"), {}))  # it began b, and heard of a, later
    newer = ready(seed=5)
    newer.restore_from_dir(str(tmp_path))
    assert [t.status for t in newer.state.trainings] == ["done"]
    newer.on_trial_complete("a", result(1.0))  # Tune runs it again: it counts once
    assert newer.suggest("b2") == {"x": config_of(search, "b")["x"]}
    assert newer.suggest("c") == search.suggest("c")
    snapshot_of(
        tmp_path,
        *((t, "RUNNING", config_of(search, t), {}) for t in "abc"),
    )
    older = ready(seed=5)
    older.restore_from_dir(str(tmp_path))
    assert older.suggest("d") == search.suggest("d")


def test_a_trial_that_failed_and_was_tried_again_with_success_counts(tmp_path: Path) -> None:
    search = ready()
    search.suggest("a")
    search.on_trial_complete("a", error=True)
    search.save_to_dir(str(tmp_path), "1")
    snapshot_of(tmp_path, ("a", "TERMINATED", config_of(search, "a"), result(1.0)))
    fresh = ready()
    fresh.restore_from_dir(str(tmp_path))
    assert [(t.status, t.upper_loss) for t in fresh.state.trainings] == [("done", 1.0)]


def test_a_trial_that_the_search_does_not_remember_counts_if_it_is_of_its_space() -> None:
    search = ready()
    search.on_trial_complete("a", result(1.0, **{"config/x/a": 0.1, "config/note": "constant"}))
    search.on_trial_complete("b", result(1.0, **{"config/x/a": 1e9}))
    search.on_trial_complete("c", result(1.0, **{"config/lr": 0.1}))
    assert [(t.status, t.upper_loss) for t in search.state.trainings] == [("done", 1.0)]


def test_points_known_from_elsewhere_inform_the_search() -> None:
    search = BilevelSearch(Parabola(), max_concurrent=1)
    search.add_evaluated_point({"x/a": 0.5}, 0.7)  # before the space is known, and flat
    search.set_search_properties("upper_loss", "min", SPACE)
    search.add_evaluated_point({"x": {"a": 0.1}}, 0.1)
    search.add_evaluated_point({"x": {"a": 0.2}}, 0.0, error=True)
    with pytest.raises(SpaceError, match=r"x/a = 1000000.0 is outside"):
        search.add_evaluated_point({"x": {"a": 1e6}}, 0.0)
    assert [t.upper_loss for t in search.state.measured] == [0.7, 0.1]
    assert search.state.best is None  # no trained weights are known there


def test_the_paper_s_method_finishes_by_itself() -> None:
    search = ready(method="paper", max_concurrent=5)
    trials = [str(number) for number in range(5)]
    assert [search.suggest(trial)["x"]["a"] for trial in trials] == pytest.approx([1e-4, 10**-2.5, 0.1, 10**0.5, 100])
    from dataclasses import replace

    from raybilevel.search_state import StepRecord

    optimizer = search._ready()
    for trial in trials:
        optimizer.tell(trial, None)
    steps = tuple(StepRecord(number, 0, 1.0) for number in range(5))
    optimizer.state = replace(optimizer.state, steps=steps)
    assert search.suggest("one more") == Searcher.FINISHED


def test_the_saved_state_is_named_fields(tmp_path: Path) -> None:
    search = ready()
    search.suggest("a")
    search.on_trial_complete("a", result(1.0))
    search.save(str(tmp_path / "state"))
    saved = read(tmp_path / "state")
    assert saved.state == search.state
    assert saved.trials == {"a": 0}
    assert [p.name for p in saved.parameters] == ["x/a"]


def test_a_limit_of_a_later_run_may_be_larger_than_that_of_the_one_before() -> None:
    search = ready(max_concurrent=8)
    for limit, slots in ((2, 2), (6, 6), (20, 8)):
        search.set_max_concurrency(limit)
        assert search._ready().slots == slots


def test_checkpoints_are_found_where_a_restored_experiment_has_been_moved(tmp_path: Path) -> None:
    search = ready()
    for trial in "ab":
        search.suggest(trial)
    search.on_trial_complete("a", result(trial_path="/old/tune/trial_a"))
    search.save(str(tmp_path / "state"))
    moved = BilevelSearch(Parabola(), max_concurrent=4)
    moved.restore(str(tmp_path / "state"))
    assert moved.checkpoint_of(moved.state.done[0]) == "/old/tune/trial_a/checkpoint_000001"
    moved.on_trial_result("b", result(trial_path="/new/place/tune/trial_b", finished=False))
    moved.on_trial_complete("b", result(trial_path="/new/place/tune/trial_b"))
    assert [moved.checkpoint_of(training) for training in moved.state.done] == [
        "/new/place/tune/trial_a/checkpoint_000001", "/new/place/tune/trial_b/checkpoint_000001",
    ]  # fmt: skip


def test_a_bucket_is_not_the_folder_in_which_an_experiment_was_before(tmp_path: Path) -> None:
    bucket = pyarrow.fs.S3FileSystem(anonymous=True, region="none")
    assert not Checkpoints(bucket).is_there(str(tmp_path))
    assert Checkpoints(None).is_there(str(tmp_path))


def test_a_trial_s_end_starts_no_ray() -> None:
    """Where the next thing to do is an upper-level step, which `ray.put` would start a Ray of its own for."""
    search = ready(max_concurrent=1)
    for trial in "abc":
        assert search.suggest(trial) is not None
        search.on_trial_complete(trial, result(1.0))
    assert not ray.is_initialized()
    assert search._ready().plan() is not None


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"method": Default(explore_every=3)}, "explore_every is 6 in the state and 3 in this search"),
        ({"method": Default(region=TrustRegionRule(initial=0.1))}, r"region\.initial is 0\.2 in the state and 0\.1"),
        ({"method": "paper"}, "of method 'default', this search is of 'paper'"),
        ({"metric": "score", "mode": "max"}, "of metric 'upper_loss', mode 'min'; this search is of metric 'score'"),
    ],
)
def test_a_state_of_other_settings_is_refused_and_the_search_begins_anew(
    other: dict[str, Any], words: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    search = ready()
    search.suggest("a")
    search.save(str(tmp_path / "state"))
    fresh = BilevelSearch(Parabola(), **other)
    with caplog.at_level(logging.ERROR):
        fresh.restore(str(tmp_path / "state"))
    assert re.search(words, caplog.text)
    assert "begins anew" in caplog.text
    assert fresh.state.trainings == ()


def test_a_state_of_another_metric_is_taken_up_with_the_method_that_searches_it(tmp_path: Path) -> None:
    search = BilevelSearch(Parabola(), space=SPACE, metric="score", mode="max", max_concurrent=1)
    assert search.method == Default(hypergradients=False)
    search.suggest("a")
    search.save(str(tmp_path / "state"))
    fresh = BilevelSearch(Parabola(), max_concurrent=1)
    fresh.restore(str(tmp_path / "state"))
    assert fresh.method == search.method and (fresh.metric, fresh.mode) == ("score", "max")
    fresh.on_trial_complete("a", {**result(1.0), "score": 3.0})
    assert [t.upper_loss for t in fresh.state.done] == [-3.0]
