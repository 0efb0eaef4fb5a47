"""Records on disk, and which algorithm made them."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import raybilevel
from raybilevel._records import store as records
from raybilevel._records.incumbents import incumbent, incumbent_at
from raybilevel._records.record import Hyperparameter, Observation, Overhead, Record, Settings, Step, TrialLog
from raybilevel._records.versions import NOT_ALGORITHM, core_digest
from raybilevel.errors import DataError

PACKAGE = Path(raybilevel.__file__).parent


def observation(upper_loss: float | None, cost: float, best: int = 0) -> Observation:
    return Observation(
        status="failed" if upper_loss is None else "done", unit=(0.1,), hyperparameters={"decay": {"a": 1e-3}},
        upper_loss=upper_loss, lower_loss=upper_loss, cost=cost, spent=10 * cost, seconds=100 * cost, incumbent=best,
    )  # fmt: skip


def record(**fields: Any) -> Record:
    return Record(
        kind="comparison", status="done", problem_name="p", method_name="m", epochs_per_training=4,
        settings=Settings(problem="ridge", options={"groups": 2}, method="random", seed=0, budget=30.0),
        space=(Hyperparameter(name="decay/a", low=1e-6, high=1.0, log=True),), **fields,
    )  # fmt: skip


def full() -> Record:
    return record(
        observations=(observation(2.0, 1.0), observation(None, 2.0), observation(1.0, 3.0, 2)),
        trials=(TrialLog(trial="t", seconds=(1.0, 2.0), epochs=(1, 2), upper_losses=(3.0, None)),),
        steps=(Step(number=0, began=1.0, ended=2.0, hypergradients={3: (0.1,)}),),
        refits={2: {"test_loss": math.inf}},  # a refit may diverge
        overhead=Overhead(calls=3, upper_seconds=0.5),
        versions={"ray": "2", "ax-platform": None},
        search={"state": {"trainings": []}},
    )


def test_a_record_reads_back_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "records" / "p" / "a.json"
    records.write(path, full())
    assert records.read(path) == full()
    assert records.read_all(tmp_path) == ([full()], [])
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


def test_what_is_in_the_way_is_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for status in ("failed", "interrupted", "done"):
        records.write(path, full().model_copy(update={"status": status}))
    assert records.read(path).status == "done"
    assert records.read(tmp_path / "a.json.old1").status == "failed"
    assert records.read(tmp_path / "a.json.old2").status == "interrupted"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": 1}, "a record of format 1; this version reads format 2"),
        ({"format": 3}, "a record of format 3; this version reads format 2"),
        ({"speed": 3}, "not a record of a run: speed: Extra inputs are not permitted"),
        ({"observations": [{"upper": 1.0}]}, r"not a record of a run: observations\.0\."),
    ],
)
def test_what_is_no_record_is_refused_with_what_is_wrong(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(json.loads(full().model_dump_json()) | change))
    with pytest.raises(DataError, match=rf"a\.json: {words}"):
        records.read(path)


def test_a_record_is_known_by_its_settings() -> None:
    settings = record().settings
    path = records.path_of("p", "m", settings)
    assert path == records.path_of("p", "m", settings.model_copy())
    assert path.parts[:2] == ("records", "p") and path.name.startswith("m-seed0-")
    assert path != records.path_of("p", "m", settings.model_copy(update={"budget": 31.0}))


def test_the_incumbent_is_that_of_the_last_training_before() -> None:
    seen = full().observations
    assert [incumbent_at(seen, cost) for cost in (0.5, 1.0, 2.9, 3.0)] == [None, 0, 0, 2]
    assert [incumbent_at(seen, spent, "spent") for spent in (9.0, 29.0, 30.0)] == [None, 0, 2]
    assert incumbent_at((observation(None, 1.0), observation(2.0, 2.0, 1)), 1.5) is None
    assert incumbent(full(), 30.0) == 2
    assert incumbent(full(), 31.0) is None  # the budget ended before
    assert incumbent(full().model_copy(update={"exhausted": True}), 31.0) == 2
    assert incumbent(full(), 1e9, "seconds") == 2


ALGORITHM = ("_lower/training.py", "_metrics.py", "_linear/krylov.py", "tune/_scheduler.py")
REST = ("problems/ridge.py", "report/_frames.py", "_command/progress.py", "_compare/ledger.py", "cli.py")


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of some of the package's code."""
    copy = tmp_path / "raybilevel"
    for name in (*ALGORITHM, *REST):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(PACKAGE / name, copy / name)
    return copy


def changed(package: Path, name: str, before: str, after: str) -> bool:
    """Whether the digest changes with a file."""
    path, digests = package / name, []
    text = path.read_text()
    assert before in text
    for content in (text, text.replace(before, after, 1)):
        path.write_text(content)
        core_digest.cache_clear()
        digests.append(core_digest(package))
    path.write_text(text)
    return digests[0] != digests[1]


def test_the_digest_changes_with_the_algorithms_code(package: Path) -> None:
    assert changed(package, "_linear/krylov.py", "    return ", "    return 2 * ")
    assert changed(package, "_lower/training.py", "self.epoch += 1", "self.epoch += 2")
    for name in ALGORITHM:
        assert changed(package, name, "from __future__ import annotations\n", "X = 1\n")


def test_the_digest_does_not_change_with_words_or_with_other_code(package: Path) -> None:
    assert not changed(package, "_lower/training.py", "self.epoch += 1", "self.epoch += 1  # the next")
    assert not changed(package, "_linear/krylov.py", '"""', '"""In other words: ')
    assert not changed(package, "_metrics.py", '"""What a descent along', '"""All that a descent along')
    for name in REST:
        assert not changed(package, name, "from __future__ import annotations\n", "X = 1\n")


def test_the_digest_is_of_every_part_of_the_package() -> None:
    core_digest.cache_clear()
    parts = {path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"}
    assert parts > NOT_ALGORITHM  # none of them has been moved
    assert core_digest() == core_digest(PACKAGE) and len(core_digest()) == 12


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("raybilevel.report", ("ray", "sklearn", "botorch", "gpytorch", "benchmarks", "raybilevel.problems",
                               "raybilevel.tune", "raybilevel._command", "raybilevel._compare")),
        ("raybilevel._compare.command, raybilevel._compare.config, raybilevel._compare.methods", ("benchmarks",)),
    ],
)  # fmt: skip
def test_reading_results_takes_no_more_than_it_needs(module: str, absent: tuple[str, ...]) -> None:
    pytest.importorskip("pandas", reason="the extra `report` is not installed")
    code = f"import sys, {module}\nfound = set({absent!r}) & set(sys.modules)\nassert not found, found"
    subprocess.run([sys.executable, "-c", code], check=True)
