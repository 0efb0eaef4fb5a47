from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest
from ray import tune

from benchmarks import scripts
from benchmarks.botorch_search import BoTorchSearch
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
    records = [run("random", 0, 0.5, 0.4), run("random", 1, 0.3, 0.6), run("raybilevel", 1, 0.2, 0.9)]
    failed = Run(Key("timm_recipe", "optuna-gp", 0, 1), (), 1, 1.0, {})
    random, ours, gp = rows([*records, failed])
    assert random[:4] == ("timm_recipe, random", "2", "0", "2.0 [2.0, 2.0]") and random[5].startswith("0.3500 [")
    assert random[-1] == "-0.1000"
    assert ours == ("timm_recipe, raybilevel", "1", "0", "2.0", "2.0 [2.0, 2.0]", "0.2000", "2.0000", "", "")
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


def test_what_is_left_out_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    performed: list[str] = []
    monkeypatch.setattr(scripts, "find_spec", lambda package: None)
    monkeypatch.setattr(scripts, "start_ray", lambda cpus: None)
    monkeypatch.setattr(
        scripts,
        "performed",
        lambda key: performed.append(key.searcher) or Run(key, (Trial(0.5, 0.5, 0.9, 1.0),), 0, 1.0, {}),
    )
    scripts.main(
        ["--out", str(tmp_path), "--scripts", "char_gpt", "--searchers", "random", "optuna-gp", "--seeds", "1"]
    )
    assert performed == ["random"]
    printed = capsys.readouterr().out
    assert "optuna-gp: left out; optuna is not installed" in printed and "bohb: left out" in printed


def test_botorch_learns_of_values_over_a_mixed_space() -> None:
    space = {"lr": tune.loguniform(1e-4, 1.0), "kind": tune.choice(["a", "b"]), "depth": tune.randint(1, 5)}
    search = BoTorchSearch(seed=0)
    assert search.set_search_properties("loss", "min", space)
    losses = []
    for number in range(16):
        config = search.suggest(str(number))
        loss = (math.log10(config["lr"]) + 0.5) ** 2 / 4 + (config["kind"] == "a") + 0.2 * (config["depth"] - 4) ** 2
        losses.append(loss)
        search.on_trial_complete(str(number), {"loss": loss} if number != 3 else None, error=number == 3)
    assert len(search.told) == 15
    # After eight Sobol points.
    assert min(losses[8:]) < 0.2 * min(losses[:8])
