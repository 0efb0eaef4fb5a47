"""Several objectives, with Tune, and in a report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ray import tune
from ray.tune.logger import JsonLoggerCallback

import raybilevel
from raybilevel import BilevelSearch, lower_level_trainable
from raybilevel.errors import ConfigError, RaybilevelError
from raybilevel.report import write
from tests.tiny_problems import Parabola

pytestmark = pytest.mark.usefixtures("local_ray")

SPACE = {"x": {"a": tune.loguniform(1e-2, 1e2)}}
# y* = log10(x), F = (y + 1)^2 and score = -|y|: the front lies between x = 0.1 and x = 1.
OBJECTIVES: dict[str, Any] = {"metric": ["upper_loss", "score"], "mode": ["min", "max"]}


def fit(search: BilevelSearch, folder: Path, samples: int) -> Any:
    return tune.run(
        lower_level_trainable(Parabola()), config=SPACE, search_alg=search, num_samples=samples, verbose=0,
        storage_path=str(folder), name="run", reuse_actors=True, callbacks=[JsonLoggerCallback()],
    )  # fmt: skip


def test_a_front_is_searched_told_saved_and_drawn(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    search = BilevelSearch(Parabola(), max_concurrent=1, **OBJECTIVES)
    summary = raybilevel.summarise(fit(search, tmp_path, 7))
    front = search.pareto_front
    assert len(front) >= 3 and all(-1.0 <= t.others[0] <= 1.1 for t in front)
    assert {t.proposal.origin for t in search.state.trainings} == {"start", "front"}
    # As the trials reported them.
    assert summary["other_objectives"] == {"score": "max"}
    told = summary["pareto_front"]
    assert [t["upper_loss"] for t in told] == [t.upper_loss for t in front]
    assert [t["other_objectives"]["score"] for t in told] == [-t.others[0] for t in front]
    assert summary["in_words"][0].startswith(f"Found: a Pareto front of {len(front)} trainings, from F (validation")
    assert f"to score {max(t['other_objectives']['score'] for t in told):.4g} at training" in summary["in_words"][0]
    json.dumps(summary, allow_nan=False)
    # What Tune has saved goes on with these objectives only.
    folder = tmp_path / "run"
    again, other = BilevelSearch(Parabola(), **OBJECTIVES), BilevelSearch(Parabola(), metric="upper_loss", mode="min")
    again.restore_from_dir(str(folder))
    assert again.pareto_front == front
    other.restore_from_dir(str(folder))
    assert not other.state.trainings
    assert "the state is of the objectives {'score': 'max'} beside its metric; this search has {}" in caplog.text
    # The report.
    page = write(folder).read_text(encoding="utf-8")
    assert "Pareto front: score against F" in page
    assert any(path.stem == "front_score" for path in folder.rglob("*"))


def test_an_objective_that_trials_do_not_report_ends_the_search(tmp_path: Path) -> None:
    search = BilevelSearch(Parabola(), metric=["upper_loss", "latency_ms"], mode="min", max_concurrent=1)
    with pytest.raises(RaybilevelError, match="reported no 'latency_ms'; it is an objective: return it"):
        fit(search, tmp_path, 4)


def test_a_method_that_searches_one_metric_refuses_a_list() -> None:
    with pytest.raises(ConfigError, match="Paper searches one metric, not score too"):
        BilevelSearch(Parabola(), SPACE, method="paper", **OBJECTIVES)
