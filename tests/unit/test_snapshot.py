"""Tune's files are read as data, and damaged ones are set aside before it resumes from them."""

from __future__ import annotations

import json
import logging
import os
import pickle
from pathlib import Path
from typing import Any

import pyarrow.fs
import pytest
from ray import tune
from ray.tune.search import Searcher

from raybilevel.errors import StateError
from raybilevel.tune._searcher import BilevelSearch
from raybilevel.tune._snapshot import ResumableGenerator, TrialRecord, parse, prepare_resume, read_trials
from tests.tiny_problems import Parabola

LOCAL = pyarrow.fs.LocalFileSystem()


def snapshot(*trials: str, status: str = "TERMINATED") -> str:
    result = {"last_result": {"upper_loss": 1.0}} if status == "TERMINATED" else {}
    return json.dumps(
        {
            "trial_data": [
                (json.dumps({"trial_id": trial, "status": status, "config": {"x": 1.0}}), json.dumps(result))
                for trial in trials
            ]
        }
    )


def fill(folder: Path, **files: str | bytes) -> None:
    for name, content in files.items():
        kind, _, session = name.partition("_")
        names = {
            "experiment": "experiment_state-",
            "generator": "search_gen_state-",
            "previous": "previous-search_gen_state-",
        }
        path = folder / f"{names[kind]}{session}.json"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_snapshot_is_read_in_order_and_nothing_in_it_is_unpickled() -> None:
    text = snapshot("a", "b")
    assert parse(text) == [
        TrialRecord("a", "TERMINATED", {"x": 1.0}, {"upper_loss": 1.0}),
        TrialRecord("b", "TERMINATED", {"x": 1.0}, {"upper_loss": 1.0}),
    ]
    hostile = {"_type": "CLOUDPICKLE_FALLBACK", "value": pickle.dumps(print).hex()}
    data = [(json.dumps({"trial_id": "a", "status": "PENDING", "config": {"x": hostile}}), "{}")]
    assert parse(json.dumps({"trial_data": data}))[0].config == {"x": hostile}


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"trial_data": 3}', '{"trial_data": [["{}", "{}"]]}', snapshot("a")[:-9]]
)
def test_what_is_no_snapshot_is_refused(text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(StateError):
        parse(text)
    assert read_trials(tmp_path) is None
    (tmp_path / "experiment_state-1.json").write_text(text)
    with caplog.at_level(logging.ERROR):
        assert read_trials(tmp_path) is None
    assert "experiment_state-1.json" in caplog.text


def test_whole_files_are_left_alone(tmp_path: Path) -> None:
    fill(tmp_path, experiment_1=snapshot("a"), generator_1=pickle.dumps({"counter": 1}))
    before = names(tmp_path)
    assert prepare_resume(LOCAL, str(tmp_path)) == []
    assert names(tmp_path) == before
    assert prepare_resume(LOCAL, str(tmp_path / "nowhere")) == []


def test_damaged_files_are_set_aside_and_older_ones_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = pickle.dumps({"counter": 1})
    fill(tmp_path, experiment_1=snapshot("a"), experiment_2=snapshot("a", "b")[:-7])
    fill(tmp_path, generator_2=good[:-3], previous_2=good)
    with caplog.at_level(logging.ERROR):
        aside = prepare_resume(LOCAL, str(tmp_path))
    assert sorted(Path(path).name for path in aside) == ["experiment_state-2.json", "search_gen_state-2.json"]
    assert names(tmp_path) == {
        "experiment_state-1.json", "experiment_state-2.json.damaged",
        "search_gen_state-2.json", "search_gen_state-2.json.damaged",
    }  # fmt: skip
    assert (tmp_path / "search_gen_state-2.json").read_bytes() == good
    assert "truncated" in caplog.text or "not a" in caplog.text


def test_with_nothing_whole_left_it_says_so_instead_of_beginning_anew(tmp_path: Path) -> None:
    fill(tmp_path, experiment_1="", generator_1=pickle.dumps({}))
    with pytest.raises(StateError, match="no snapshot"):
        prepare_resume(LOCAL, str(tmp_path))
    fill(tmp_path, experiment_1=snapshot("a"), generator_1=b"\x80")
    with pytest.raises(StateError, match="search generator"):
        prepare_resume(LOCAL, str(tmp_path))


def test_an_experiment_that_had_not_begun_begins(tmp_path: Path) -> None:
    fill(tmp_path, experiment_1=snapshot("a", status="PENDING"))  # killed before the second file was written
    assert prepare_resume(LOCAL, str(tmp_path)) == []
    assert names(tmp_path) == {"experiment_state-1.json.damaged"}


class Fixed(Searcher):  # type: ignore[misc]
    """A searcher with a state of nothing."""

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        return None

    def save(self, checkpoint_path: str) -> None:
        Path(checkpoint_path).write_text("state")

    def restore(self, checkpoint_path: str) -> None:
        assert Path(checkpoint_path).read_text() == "state"


def test_the_counter_of_trials_is_the_number_of_trials(tmp_path: Path) -> None:
    generator = ResumableGenerator(Fixed())
    for counter in (3, 4):
        generator._counter = counter
        generator.save_to_dir(str(tmp_path), "1")
    assert "previous-search_gen_state-1.json" in names(tmp_path)
    (tmp_path / "experiment_state-1.json").write_text(snapshot("a", "b"))
    again = ResumableGenerator(Fixed())
    again.restore_from_dir(str(tmp_path))
    assert again._counter == 2


def test_a_resumed_experiment_may_have_more_trials_than_it_began_with(tmp_path: Path) -> None:
    generator = ResumableGenerator(Fixed())
    generator._counter, generator._total_samples = 2, 2
    generator.save_to_dir(str(tmp_path), "1")
    (tmp_path / "experiment_state-1.json").write_text(snapshot("a", "b"))
    for samples, total in ((None, 2), (5, 5)):
        again = ResumableGenerator(Fixed(), samples)
        again.restore_from_dir(str(tmp_path))
        assert again.total_samples == total
        assert again.is_finished() == (total == 2)


def test_files_left_by_a_killed_driver_that_the_storage_lacks_are_not_read(tmp_path: Path) -> None:
    """Tune copies the storage into a folder in which a killed driver of the same Ray session has left newer files."""
    space = {"x": {"a": tune.uniform(0.0, 1.0)}}
    killed = BilevelSearch(Parabola(), space=space, metric="upper_loss", mode="min", max_concurrent=1)
    config = killed.suggest("a")
    killed.save_to_dir(str(tmp_path), "1")
    killed.on_trial_complete("a", error=True)
    killed.suggest("b")
    killed.save_to_dir(str(tmp_path), "2")
    fill(tmp_path, generator_1=pickle.dumps({"counter": 1}), generator_2=pickle.dumps({"counter": 2}))
    for session, trials in (("1", ["a"]), ("2", ["a", "b"])):
        records = [
            (json.dumps({"trial_id": trial, "status": "PENDING", "config": config}), json.dumps({})) for trial in trials
        ]
        (tmp_path / f"experiment_state-{session}.json").write_text(json.dumps({"trial_data": records}))
    for path in tmp_path.iterdir():
        os.utime(path, (1e9, 1e9))
    search = BilevelSearch(Parabola(), metric="upper_loss", mode="min", max_concurrent=1)
    again = pickle.loads(pickle.dumps(search))  # as `Tuner.restore` has it
    for name in ("experiment_state-1.json", "searcher-state-1.pkl", "search_gen_state-1.json"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes())
    for restored in (search, again):
        restored.restore_from_dir(str(tmp_path))
        assert set(restored._ready().trials) == {"a"}
    assert [record.trial for record in read_trials(tmp_path, search._session.began) or ()] == ["a"]
    assert [record.trial for record in read_trials(tmp_path) or ()] == ["a", "b"]


def test_of_the_newest_snapshot_its_copy_alone_may_have_reached_the_storage(tmp_path: Path) -> None:
    fill(tmp_path, experiment_1=snapshot("a"), generator_1=pickle.dumps({"counter": 1}))
    (tmp_path / "previous-experiment_state-2.json").write_text(snapshot("a", "b"))
    assert prepare_resume(LOCAL, str(tmp_path)) == []
    assert [record.trial for record in read_trials(tmp_path) or ()] == ["a", "b"]


def test_a_truncated_snapshot_is_replaced_by_the_copy_that_the_searcher_keeps(tmp_path: Path) -> None:
    search = BilevelSearch(Parabola())
    (tmp_path / "experiment_state-1.json").write_text(snapshot("a", "b"))
    search.save_to_dir(str(tmp_path), "1")  # as Tune does after it has written its own
    (tmp_path / "experiment_state-1.json").write_text(snapshot("a", "b", "c")[:-9])
    fill(tmp_path, generator_1=pickle.dumps({"counter": 2}))
    assert prepare_resume(LOCAL, str(tmp_path)) == [str(tmp_path / "experiment_state-1.json")]
    assert [record.trial for record in read_trials(tmp_path) or ()] == ["a", "b"]
