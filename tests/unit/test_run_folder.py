"""A folder of `raybilevel run`, as Tune and the command leave it, read as a record."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from raybilevel._records.run_folder import read_run, search_of
from raybilevel.errors import DataError, StateError
from raybilevel.report import _result as tables
from raybilevel.report import _single as single
from raybilevel.search import _state_file as state_file
from raybilevel.search_state import Proposal, SearchState, StepRecord, Training
from raybilevel.space import Parameter

PARAMETER = Parameter(("decay", "g0"), 1e-4, 1.0, log=True)


def training(index: int, status: Any, upper_loss: float = math.nan, finished: int | None = None) -> Training:
    return Training(
        index, Proposal((0.5,), "start"), status, index if finished is None else finished, lower_loss=2 * upper_loss,
        upper_loss=upper_loss, lower_gradient=(0.0,), passes=10.0,
    )  # fmt: skip


STATE = SearchState(
    (training(0, "failed"), training(1, "done", 3.0), training(2, "stopped", 1.0), training(3, "done", 2.0),
     training(4, "pending", finished=-1)),
    (StepRecord(0, 1, passes=5.0, finished=2),),
)  # fmt: skip


def lines(trial: str, count: int, **last: Any) -> str:
    """What Tune's JSON logger writes: a line an epoch, which begins at 100 s and takes a second."""
    results = [
        {"trial_id": trial, "epoch": epoch, "upper_loss": 9.0 / epoch, "lower_loss": 1.0, "test_loss": 0.5,
         "training_iteration": epoch, "timestamp": 100 + epoch, "time_total_s": epoch, "time_this_iter_s": 1.0,
         "pid": 7, "node_ip": "here", "lower_passes": 3.0 * epoch}
        for epoch in range(1, count + 1)
    ]  # fmt: skip
    results[-1] |= last
    return "".join(f"{json.dumps(result)}\n" for result in results)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = {"problem": "ridge", "options": {"groups": 1}, "search": {"trainings": 5, "method": "default"},
              "space": {"decay": {"g0": {"loguniform": [1e-4, 1.0]}}}}  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    saved = state_file.SavedSearch(
        method="Default", settings="{}", seed=0, slots=1, metric="upper_loss", mode="min", parameters=(PARAMETER,),
        constants="{}", state=STATE, trials={name: index for index, name in enumerate("abcde")}, queue=(),
        checkpoints={},
    )  # fmt: skip
    tune = tmp_path / "tune"
    for name, text in (
        ("b", lines("b", 4, lower_level_finished=True, training_accuracy=0.9)),
        ("c", lines("c", 2)),
        ("e", lines("e", 1) + '{"trial_id": "e", "epo'),
    ):
        (tune / name).mkdir(parents=True)
        (tune / name / "result.json").write_text(text)
    state_file.write(tune / "searcher-state-1.pkl", saved)
    return tmp_path


def test_trainings_of_every_kind_are_read(folder: Path) -> None:
    record = read_run(folder)
    assert (record.kind, record.status, record.epochs_per_training) == ("run", "running", 4)
    assert record.settings.method_settings == {} and record.settings.budget == 5
    assert [o.status for o in record.observations] == ["failed", "done", "stopped", "done"]
    assert [o.upper_loss for o in record.observations] == [None, 3.0, None, 2.0]
    assert [o.stopped_upper_loss for o in record.observations] == [None, None, 1.0, None]
    assert [o.incumbent for o in record.observations] == [0, 1, 1, 3]
    assert [o.extra_passes for o in record.observations] == [0.0, 0.0, 5.0, 5.0]
    assert record.observations[1].metrics == {"test_loss": 0.5, "training_accuracy": 0.9}
    assert [o.seconds for o in record.observations] == [0.0, 4.0, 2.0, 3.0]  # of those without a file, their number
    assert record.observations[0].hyperparameters == {"decay": {"g0": pytest.approx(1e-2)}}
    search = search_of(record)
    assert search is not None and repr(search.state) == repr(STATE)  # NaN is not equal to itself


def test_trials_are_read_epoch_by_epoch(folder: Path) -> None:
    trials = {trial.trial: trial for trial in read_run(folder).trials}
    assert {name: trial.status for name, trial in trials.items()} == {"b": "done", "c": "stopped", "e": "running"}
    assert trials["c"].upper_losses == (9.0, 4.5) and trials["c"].seconds == (1.0, 2.0)
    assert trials["e"].epochs == (1,)  # the line that is half-written is left out


def test_the_summary_ends_a_run(folder: Path) -> None:
    best = {"training": 4, "test_loss_refit": 0.25}
    summary = {"best": best, "trainings": 4, "in_words": ["Found: F"],
               "wall_seconds": 60.0, "verdict": "converged", "versions": {"ray": "2"},
               "diagnostics": {"multiplier": 1.5, "hypergradient_length": None}}  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))
    record = read_run(folder)
    assert (record.status, record.seconds, record.verdict) == ("done", 60.0, "converged")
    assert record.refits == {3: {"test_loss": 0.25}}
    assert record.diagnostics == {"multiplier": 1.5, "hypergradient_length": None}
    assert record.in_words == ("Found: F",)
    (folder / "summary.json").write_text(json.dumps({**summary, "trainings": 3}))  # of before it was extended
    assert read_run(folder).status == "running"


def test_the_last_incumbent_is_the_training_that_was_returned(folder: Path) -> None:
    summary = {"best": {"training": 2, "test_loss_refit": 0.25}, "trainings": 4}  # its F is 3, the lowest is 2
    (folder / "summary.json").write_text(json.dumps(summary))
    record = read_run(folder)
    assert [o.incumbent for o in record.observations] == [0, 1, 1, 1]
    charts, result = single.charts(record), tables.tables(record)[0]
    assert result.headers[:3] == ("", "test loss", "test loss after refit")
    assert result.plain_rows[0][:3] == ["result, the start (training 2)", "0.5", "0.25"]
    assert [row[0] for row in tables.improvements(record).rows] == ["2", "4"]
    line = next(s for chart in charts if chart.name == "progress" for s in chart.series if s.name == "best so far")
    assert line.y == [3.0, 2.0]


def test_a_descent_is_read_by_its_steps(folder: Path) -> None:
    path = folder / "tune" / "b" / "result.json"
    path.write_text(path.read_text().replace('"epoch"', '"step"'))
    trials = {trial.trial: trial for trial in read_run(folder).trials}
    assert trials["b"].epochs == (1, 2, 3, 4)


def test_a_run_with_a_failed_training_has_a_report(folder: Path) -> None:
    pytest.importorskip("plotly", reason="the extra `report` is not installed")
    from raybilevel import report

    assert report.write(folder).is_file()
    loaded = report.load(folder)
    assert loaded.observations["status"].tolist() == ["failed", "done", "stopped", "done"]
    assert loaded.tables["improvements"]["F"].tolist() == ["3", "2"]
    assert loaded.tables["improvements"]["training"].tolist() == ["2", "4"]


def test_what_is_no_search_is_named(folder: Path) -> None:
    record = read_run(folder)
    with pytest.raises(StateError, match="ridge default: not a search state"):
        search_of(record.model_copy(update={"search": {"method": "Default"}}))
    (folder / "tune" / "searcher-state-1.pkl").unlink()
    with pytest.raises(DataError, match="no search state in tune/ yet"):
        read_run(folder)
