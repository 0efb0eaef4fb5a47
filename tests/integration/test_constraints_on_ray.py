"""Constraints on reported metrics, with Tune."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ray import tune
from ray.tune.logger import JsonLoggerCallback

import raybilevel
from raybilevel import BilevelSearch, lower_level_trainable
from raybilevel.errors import ConfigError, RaybilevelError
from tests.tiny_problems import Parabola

pytestmark = pytest.mark.usefixtures("local_ray")

SPACE = {"x": {"a": tune.loguniform(1e-2, 1e2)}}
# y* = log10(x), F = (y + 1)^2 and score = -|y|: at least -0.5 is not at the lowest F, and F is 0.25 where it just is.
CONSTRAINTS = {"score": ">= -0.5"}


def fit(search: BilevelSearch, folder: Path, samples: int) -> Any:
    return tune.run(
        lower_level_trainable(Parabola()), config=SPACE, search_alg=search, metric="upper_loss", mode="min",
        num_samples=samples, storage_path=str(folder), name="run", verbose=0, reuse_actors=True,
        callbacks=[JsonLoggerCallback()],
    )  # fmt: skip


def test_the_result_keeps_the_constraints(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    search = BilevelSearch(Parabola(), max_concurrent=1, constraints=CONSTRAINTS)
    results = fit(search, tmp_path, 5)
    best = search.best
    assert best is not None and best.feasible and best.upper_loss >= 0.25 - 1e-9
    lowest = min(search.state.done, key=lambda t: t.upper_loss)
    assert not lowest.feasible  # the start design has x = 0.1, where F is 0
    summary = raybilevel.summarise(results)
    assert summary["constraints"] == CONSTRAINTS and summary["best"]["feasible"]
    assert summary["best"]["upper_loss"] == best.upper_loss and summary["metrics"]["score"] >= -0.5
    assert ". Feasible: score >= -0.5 (-0." in summary["in_words"][0]
    # What Tune has saved goes on with these constraints only.
    (folder,) = (path for path in tmp_path.iterdir() if path.name == "run")
    again, other = (BilevelSearch(Parabola(), constraints=bounds) for bounds in (CONSTRAINTS, {"score": ">= -0.4"}))
    again.restore_from_dir(str(folder))
    assert again.best == best
    other.restore_from_dir(str(folder))
    assert not other.state.trainings
    assert "the state is of constraints {'score': '>= -0.5'}; this search has {'score': '>= -0.4'}" in caplog.text


def test_a_metric_that_no_trial_reports_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(RaybilevelError, match="reported no 'latency_ms'; constraints has a bound on it: return it"):
        fit(BilevelSearch(Parabola(), constraints={"latency_ms": "<= 5"}, max_concurrent=1), tmp_path, 4)


def test_what_cannot_be_searched_is_refused_before_a_run() -> None:
    with pytest.raises(ConfigError, match="constraints: Paper takes none"):
        BilevelSearch(Parabola(), SPACE, method="paper", constraints=CONSTRAINTS)
    with pytest.raises(ConfigError, match="score: expected '<= NUMBER' or '>= NUMBER', got '= 5'"):
        BilevelSearch(Parabola(), constraints={"score": "= 5"})
