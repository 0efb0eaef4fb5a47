from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from raybilevel.errors import StateError
from raybilevel.search import _state_file as state_file
from raybilevel.search._state_file import SavedSearch
from raybilevel.search_state import Proposal, SearchState, StepRecord, Training
from raybilevel.space import Parameter

SEARCH = SavedSearch(
    method="default",
    settings='{"decrease": 0.05}',
    seed=3,
    slots=2,
    metric="upper_loss",
    mode="min",
    parameters=(Parameter(("decay", "fc1"), 1e-4, 1.0, True), Parameter(("lr",), 0.0, 1.0, step=0.1)),
    constants='{"layers": 3}',
    state=SearchState(
        (
            Training(0, Proposal((0.1, 0.2), "start"), "done", 1, 0.5, 0.25, (1e-300, -3.0), 7.0, (0.1, 1 / 3)),
            Training(1, Proposal((0.3, 0.4), "region", 0, 0.2, 0.3, 0.01, 0.0), "failed", 0),
            Training(2, Proposal((0.5, 0.6), "global")),
        ),
        (StepRecord(0, 0, 3.5, 10.0, math.inf, 0.04, 12.0, finished=1), StepRecord(1, 0, 0.0, failed=True)),
    ),
    trials={"a_1": 0, "b_2": 1, "c": 2},
    queue=(Proposal((0.7, 0.8), "fill"),),
    checkpoints={0: "s3://bucket/trial/checkpoint_000001"},
    memory=state_file.encode(b"\x00\xff"),
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    state_file.write(tmp_path / "search.json", SEARCH)
    return tmp_path / "search.json"


def test_what_is_written_is_read(path: Path):
    found = state_file.read(path)
    # NaN is not equal to itself: compare the pending training's with its text
    assert repr(found) == repr(SEARCH)
    assert math.isnan(found.state.trainings[2].upper_loss)
    assert found.state.steps[0].violation == math.inf
    assert type(found.state.trainings[0]) is Training and type(found.parameters[0]) is Parameter
    assert state_file.decode(found.memory) == b"\x00\xff"


def test_the_file_is_json_without_nan(path: Path):
    def refuse(name: str) -> None:
        raise AssertionError(name)

    document = json.loads(path.read_text(), parse_constant=refuse)
    assert document["format"] == state_file.FORMAT
    json.loads(document["search"], parse_constant=refuse)


def test_writing_replaces_and_leaves_nothing_else(path: Path):
    state_file.write(path, replace(SEARCH, seed=99))
    assert state_file.read(path).seed == 99
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file(path: Path):
    before = path.read_bytes()
    with pytest.raises(Exception):  # noqa: B017, PT011 - whatever the serialiser raises
        state_file.write(path, replace(SEARCH, trials=object()))
    assert path.read_bytes() == before


def test_a_missing_file(tmp_path: Path):
    with pytest.raises(StateError, match="not a readable search state"):
        state_file.read(tmp_path / "none.json")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_file(path: Path, share: float):
    whole = path.read_text()
    path.write_text(whole[: int(share * len(whole))])
    with pytest.raises(StateError, match=r"search\.json"):
        state_file.read(path)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"nonsense", b"[1]", b"3", b"null", b"{}"])
def test_something_else_entirely(path: Path, content: bytes):
    path.write_bytes(content)
    with pytest.raises(StateError, match=r"search\.json"):
        state_file.read(path)


def test_a_tampered_file(path: Path):
    document = json.loads(path.read_text())
    document["search"] = document["search"].replace('"seed":3', '"seed":4')
    assert '"seed":4' in document["search"]
    path.write_text(json.dumps(document))
    with pytest.raises(StateError, match="checksum"):
        state_file.read(path)


@pytest.mark.parametrize("version", [0, 1, "2", None])
def test_another_format_version(path: Path, version: Any):
    document = json.loads(path.read_text())
    document["format"] = version
    path.write_text(json.dumps(document))
    with pytest.raises(StateError, match=f"state format {version!r}; this version reads format 3"):
        state_file.read(path)


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the search and sign it again."""
    document = json.loads(path.read_text())
    search = json.loads(document["search"])
    change(search)
    document["search"] = json.dumps(search)
    document["sha256"] = state_file.digest(document["search"])
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    "change",
    [
        lambda search: search.pop("seed"),
        lambda search: search.update(colour="red"),
        lambda search: search.update(seed="three"),
        lambda search: search["state"].pop("trainings") and search["state"].update(trainings=3),
        lambda search: search["state"]["trainings"][0].update(status="mislaid"),
        lambda search: search["state"]["trainings"][0].pop("proposal"),
        lambda search: search["queue"][0].update(unit=["x"]),
        lambda search: search["parameters"][0].update(low=2.0),
        lambda search: search["state"]["trainings"][0].update(colour="red"),
    ],
    ids=["missing", "unknown", "type", "trainings", "status", "proposal", "unit", "bounds", "deep"],
)
def test_a_signed_file_that_holds_no_search(path: Path, change: Callable[[dict[str, Any]], None]):
    rewrite(path, change)
    with pytest.raises(StateError, match="not a search state"):
        state_file.read(path)


SETTINGS = {"decrease": 0.05, "region": {"poor": 0.25}, "rates": (0.1, 0.5)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"decrease": 0.1}, r"decrease is 0\.05 in the state and 0\.1 in this"),
        ({"region": {"poor": 0.5}}, r"region\.poor is 0\.25 in the state and 0\.5 in this"),
        ({"region": {}}, "region is not there in the state and {} in this"),
        ({"rates": (0.1,)}, r"rates is \[0\.1, 0\.5\] in the state and \[0\.1\] in this"),
        ({"on": True}, "on is not there in the state and True in this"),
    ],
)
def test_settings_that_differ_are_named_with_both_values(change: dict[str, Any], words: str):
    saved = state_file.as_json(SETTINGS)
    state_file.check_settings(saved, saved)
    with pytest.raises(StateError, match=words):
        state_file.check_settings(saved, state_file.as_json({**SETTINGS, **change}))


def test_settings_as_json_do_not_depend_on_their_order():
    assert state_file.as_json({"b": 1, "a": (2, 3)}) == state_file.as_json({"a": (2, 3), "b": 1})
