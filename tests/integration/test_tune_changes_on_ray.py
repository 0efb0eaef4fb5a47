"""Real runs change Tune while they last, and leave it as it was, however they end."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from ray import tune

from raybilevel import BilevelSearch, lower_level_trainable
from raybilevel._tune_changes.applied import CHANGES
from raybilevel.tune import PatientFIFO
from tests.tiny_problems import Parabola

pytestmark = pytest.mark.usefixtures("local_ray")

SPACE = {"x": {"a": tune.loguniform(1e-4, 1e2)}}


def methods() -> list[Any]:
    found = [change.upstream() for change in CHANGES]
    return [method for _, method in found if method]  # type: ignore[misc]


class Watch(tune.Callback):
    """Which methods Tune has while a run goes on, and at its end."""

    def __init__(self, fails: bool = False) -> None:
        self.fails = fails
        self.seen: list[list[Any]] = []
        self.ended = False

    def on_step_end(self, iteration: int, trials: Any, **info: Any) -> None:
        self.seen.append(methods())
        if self.fails:
            raise RuntimeError("a callback failed")

    def on_experiment_end(self, trials: Any, **info: Any) -> None:
        self.ended = True


def run(folder: Path, watch: Watch, **options: Any) -> Any:
    return tune.run(
        lower_level_trainable(Parabola()), config=SPACE, search_alg=BilevelSearch(Parabola(), max_concurrent=1),
        metric="upper_loss", mode="min", storage_path=str(folder), callbacks=[watch], reuse_actors=True, verbose=0,
        **options,
    )  # fmt: skip


@pytest.mark.parametrize("options", [{"num_samples": 3}, {"num_samples": -1, "time_budget_s": 3}])
def test_a_run_changes_tune_while_it_lasts(options: dict[str, Any], tmp_path: Path) -> None:
    before, watch = methods(), Watch()
    run(tmp_path, watch, **options)
    assert watch.ended
    assert all(ours is not theirs for seen in watch.seen for ours, theirs in zip(seen, before, strict=True))
    assert methods() == before


def test_a_tuner_that_is_made_changes_nothing_before_it_fits(tmp_path: Path) -> None:
    before, watch = methods(), Watch()
    tuner = tune.Tuner(
        lower_level_trainable(Parabola()),
        param_space=SPACE,
        tune_config=tune.TuneConfig(
            search_alg=BilevelSearch(Parabola(), max_concurrent=1), metric="upper_loss", mode="min", num_samples=3,
            max_concurrent_trials=2, scheduler=PatientFIFO(60), reuse_actors=True,
        ),
        run_config=tune.RunConfig(storage_path=str(tmp_path), verbose=0, callbacks=[watch]),
    )  # fmt: skip
    assert methods() == before
    results = tuner.fit()
    assert len(results) == 3
    assert not results.errors
    assert methods() == before


def test_a_run_that_fails_leaves_no_change(tmp_path: Path) -> None:
    before, watch = methods(), Watch(fails=True)
    with pytest.raises(RuntimeError, match="a callback failed"):
        run(tmp_path, watch, num_samples=3)
    assert len(watch.seen) == 1
    assert watch.seen[0] != before
    assert methods() == before


def test_runs_of_other_searchers_are_tune_s_own(tmp_path: Path) -> None:
    before, watch = methods(), Watch()
    BilevelSearch(Parabola())
    tune.run(
        lower_level_trainable(Parabola()), config=SPACE, num_samples=1, storage_path=str(tmp_path), callbacks=[watch],
        verbose=0,
    )  # fmt: skip
    assert watch.seen
    assert all(seen == before for seen in watch.seen)


def test_the_scheduler_keeps_idle_actors_of_its_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="raybilevel"):
        run(tmp_path, Watch(), num_samples=2, scheduler=PatientFIFO(60))
    assert "timeout of idle actors" in caplog.text
