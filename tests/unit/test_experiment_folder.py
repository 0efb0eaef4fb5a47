"""The folder of a Tune experiment that another program started."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import raybilevel
from raybilevel._records.summary import summary_of
from raybilevel.errors import ConfigError, DataError, StateError
from raybilevel.methods import make_method
from raybilevel.problems.ridge import Ridge
from raybilevel.report._sources import read_folder
from raybilevel.search import _state_file as state_file
from raybilevel.search._local import search
from raybilevel.search._optimizer import BilevelOptimizer


@pytest.fixture(scope="module")
def saved() -> state_file.SavedSearch:
    optimizer = BilevelOptimizer(Ridge(1).space, make_method("default", upper_share=0.3), seed=0)
    search(Ridge(1), optimizer, 5)
    return state_file.SavedSearch(
        **vars(optimizer.saved()), metric="upper_loss", mode="min", constants="{}", checkpoints={0: "/there"}
    )


@pytest.fixture
def folder(tmp_path: Path, saved: state_file.SavedSearch) -> Path:
    (tmp_path / "experiment_state-1.json").write_text("{}")
    state_file.write(tmp_path / "searcher-state-1.pkl", saved)
    for number, (trial, index) in enumerate(saved.trials.items()):
        (tmp_path / f"trial_{number}").mkdir()
        result = {"trial_id": trial, "timestamp": 100.0 + number, "time_total_s": 1.0, "time_this_iter_s": 1.0,
                  "upper_loss": saved.state.trainings[index].upper_loss, "test_loss": 0.5 - number / 100,
                  "lower_level_finished": True, "epoch": 7}  # fmt: skip
        (tmp_path / f"trial_{number}" / "result.json").write_text(json.dumps(result) + "\n")
    return tmp_path


def test_its_summary_is_that_of_the_search(folder: Path, saved: state_file.SavedSearch) -> None:
    summary = raybilevel.summarise(folder)
    results = {index: {"test_loss": 0.5 - number / 100} for number, index in enumerate(saved.trials.values())}
    about = {"problem": folder.name, "method": "default", "seed": 0}
    method, seconds = make_method("default", upper_share=0.3), float(len(results))
    space = Ridge(1).space
    assert space is not None
    assert summary == summary_of(saved.state, space, method, results, {0: "/there"}, about, None, seconds)
    assert summary["best"]["upper_loss"] == min(t.upper_loss for t in saved.state.done)
    assert summary["in_words"][0].startswith("Found: F")


def test_without_tune_s_json_logger_its_snapshot_of_the_trials_is_read(folder: Path) -> None:
    expected, trials = raybilevel.summarise(folder), []
    for path in sorted(folder.glob("*/result.json")):
        result = json.loads(path.read_text())
        trials.append([json.dumps({"trial_id": result["trial_id"]}), json.dumps({"last_result": result})])
        path.unlink()
    waiting = [json.dumps({"trial_id": "new"}), json.dumps({"last_result": {"trial_id": "new"}})]
    (folder / "experiment_state-2.json").write_text(json.dumps({"trial_data": [*trials, waiting]}))
    assert raybilevel.summarise(folder) == expected
    assert any(entry.get("test_loss") for entry in expected["history"])


def test_a_metric_that_is_maximised_has_its_own_sign(folder: Path, saved: state_file.SavedSearch) -> None:
    state_file.write(folder / "searcher-state-1.pkl", replace(saved, metric="score", mode="max"))
    summary = raybilevel.summarise(folder)
    best = saved.state.best
    assert best is not None
    assert summary["best"]["upper_loss"] == -best.upper_loss == summary["history"][-1]["best_upper_loss"]
    assert summary["in_words"][0].startswith("Found: score")


def test_its_record_is_that_of_a_run_that_has_ended(folder: Path, saved: state_file.SavedSearch) -> None:
    source = read_folder(folder)
    (record,) = source.records
    assert (source.kind, record.status, record.problem_name, record.method_name) == (
        "run", "done", folder.name, "default",
    )  # fmt: skip
    assert record.verdict == raybilevel.summarise(folder)["verdict"]
    assert len(record.in_words) == 3
    assert [o.number for o in record.observations] == [t.index + 1 for t in saved.state.told]
    assert record.settings.method_settings["upper_share"] == 0.3


def test_a_method_of_ones_own_is_to_be_given(folder: Path, saved: state_file.SavedSearch) -> None:
    state_file.write(folder / "searcher-state-1.pkl", replace(saved, method="mine.Method"))
    with pytest.raises(ConfigError, match=r"of method mine\.Method, one of your own; pass it on as `method`"):
        raybilevel.summarise(folder)
    assert raybilevel.summarise(folder, make_method("default"))["method"] == "mine.Method"
    assert read_folder(folder).records[0].verdict is None


def test_other_folders_are_named(folder: Path, tmp_path: Path) -> None:
    (folder / "searcher-state-1.pkl").write_bytes(b"of another searcher")
    with pytest.raises(StateError, match="not a readable search state"):
        raybilevel.summarise(folder)
    (folder / "searcher-state-1.pkl").unlink()
    with pytest.raises(DataError, match="its search_alg a BilevelSearch"):
        raybilevel.summarise(folder)
    (folder / "experiment_state-1.json").unlink()
    with pytest.raises(DataError, match="nor of a Tune experiment"):
        read_folder(folder)


def test_lists_and_alternatives_are_told_whole(folder: Path, saved: state_file.SavedSearch) -> None:
    searched = {"widths": [8, 0.25], "optimizer": {"name": "adam"}}
    for path in folder.glob("*/result.json"):
        result = json.loads(path.read_text()) | {"config": {**searched, "data": {"folder": "here"}}}
        path.write_text(json.dumps(result) + "\n")
    state_file.write(
        folder / "searcher-state-1.pkl", replace(saved, constants='{"data": {"folder": "here"}}', space="")
    )
    summary, (record,) = raybilevel.summarise(folder), read_folder(folder).records
    assert summary["best"]["hyperparameters"] == summary["history"][-1]["hyperparameters"] == searched
    assert all(o.hyperparameters == searched for o in record.observations)
