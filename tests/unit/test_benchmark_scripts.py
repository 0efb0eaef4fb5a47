from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest

from benchmarks import scripts
from benchmarks.scripts import Key, Run, Trial, append, read, rows
from tests.unit.test_scripts import SCRIPTS


def run(searcher: str = "random", seed: int = 0, *losses: float) -> Run:
    trials = tuple(Trial(loss, 10 * loss, None, 2.0) for loss in losses)
    return Run(Key("timm_recipe", searcher, seed, len(losses)), trials, 0, 9.0, {"ray": "2"})


def test_all_scripts_are_run() -> None:
    assert sorted(scripts.SCRIPTS) == SCRIPTS


def test_records_are_read_as_they_were_written(tmp_path: Path) -> None:
    file = tmp_path / "out" / "records.jsonl"
    assert read(file) == []
    written = [run("random", 0, 0.3, 0.2), replace(run("optuna-gp", 0, 0.1), failed=3)]
    append(file, written[0])
    with file.open("a") as records:
        records.write('{"key": {"script"')  # killed while it wrote
    append(file, written[1])
    assert read(file) == written


def test_trials_that_failed_are_counted_and_the_others_ordered_by_their_end(monkeypatch: pytest.MonkeyPatch) -> None:
    class Results(list[Any]):
        experiment_path = str(Path(__file__).parent / "absent")

    def result(loss: float, at: float, error: Exception | None = None) -> Any:
        metrics = {"val_loss": loss, "test_loss": 2 * loss, "time_total_s": 1.5, "timestamp": at}
        return SimpleNamespace(metrics={} if error else metrics, error=error)

    results = Results([result(0.4, 9.0), result(0.1, 8.0, RuntimeError()), result(0.3, 7.0)])
    script = SimpleNamespace(main=lambda **settings: results)
    removed: list[str] = []
    monkeypatch.setattr("shutil.rmtree", removed.append)
    monkeypatch.setitem(sys.modules, "timm_recipe", cast(ModuleType, script))
    found = scripts.performed(Key("timm_recipe", "random", 0, 3))
    assert found.trials == (Trial(0.3, 0.6, None, 1.5), Trial(0.4, 0.8, None, 1.5)) and found.failed == 1
    assert removed == [results.experiment_path]


def test_the_best_trial_has_the_lowest_validation_loss() -> None:
    found = run("random", 0, 0.3, 0.0, 0.2)
    assert found.best == found.trials[1]
    assert replace(found, trials=()).best is None


def test_what_was_found_beyond_the_cost_of_the_trials_does_not_count() -> None:
    found = run("raybilevel", 0, 0.3, 0.2, 0.1)
    costs = (1.0, 2.5, 3.5)
    charged = replace(found, trials=tuple(replace(t, cost=c) for t, c in zip(found.trials, costs, strict=True)))
    assert charged.best == charged.trials[1]
    (row,) = rows([charged])
    assert row[3:6] == ("3.5", "2.0 [2.0, 2.0]", "0.2000")


def test_rows_compare_searchers_on_the_seeds_that_both_have() -> None:
    records = [run("random", 0, 0.5, 0.4), run("random", 1, 0.3, 0.6), run("optuna-tpe", 1, 0.2, 0.9)]
    failed = Run(Key("timm_recipe", "optuna-gp", 0, 1), (), 1, 1.0, {})
    random, tpe, gp = rows([*records, failed])
    assert random[:4] == ("timm_recipe, random", "2", "0", "2.0 [2.0, 2.0]") and random[5].startswith("0.3500 [")
    assert random[-1] == ""
    assert tpe == ("timm_recipe, optuna-tpe", "1", "0", "2.0", "2.0 [2.0, 2.0]", "0.2000", "2.0000", "", "-0.1000")
    assert gp == ("timm_recipe, optuna-gp", "1", "1", "1.0", "", "", "", "", "")


def test_runs_that_have_a_record_are_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    performed: list[Key] = []

    def perform(key: Key) -> Run:
        performed.append(key)
        return Run(key, (Trial(0.5, 0.5, 0.9, 1.0),) * key.trials, 0, 1.0, {})

    monkeypatch.setattr(scripts, "performed", perform)
    monkeypatch.setattr(scripts, "start_ray", lambda cpus: None)
    chosen: list[Any] = ["--out", str(tmp_path), "--scripts", "char_gpt", "--searchers", "random", "--trials", "2"]
    scripts.main([*chosen, "--seeds", "1"])
    scripts.main([*chosen, "--seeds", "2"])
    assert performed == [Key("char_gpt", "random", seed, 2) for seed in (0, 1)]
    assert "char_gpt, random" in capsys.readouterr().out
