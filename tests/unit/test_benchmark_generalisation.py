from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from benchmarks.generalisation import (
    LEAST_SHOWN,
    LOWEST,
    METHODS,
    OURS,
    PROBLEMS,
    SHARED,
    Outcome,
    agreement,
    calibration,
    main,
    not_chosen,
    optimism_of,
    outcome,
    report,
    runs,
)
from benchmarks.suite import execute
from raybilevel._records import store as records
from raybilevel._records.record import Step
from raybilevel.problems.banded_ridge import BandedRidge
from raybilevel.report._statistics import Interval
from raybilevel.search_state import Shrinkage


def test_every_method_has_the_same_splits() -> None:
    found = runs("data", 2, ["digits-8", "banded-ridge-4"], list(METHODS))
    assert len(found) == len({run.path for run in found}) == 2 * 2 * len(METHODS)
    assert {run.problem.options.get("split_seed") for run in found if run.problem_name == "digits-8"} == {1, 2}
    assert {run.problem.options.get("seed") for run in found if run.problem_name == "banded-ridge-4"} == {1, 2}
    for run in runs("data", 1, list(PROBLEMS), [OURS]):
        assert run.budget == 25
    own = Counter(run.problem_name for run in runs("data", None, ["digits-8", "long-tail-20"], [OURS]))
    assert own == {"digits-8": 10, "long-tail-20": 3}


def test_the_measured_gap_is_beyond_that_at_results_of_other_splits() -> None:
    shrinkage = Shrinkage(((0, 1),), "log_likelihood", 100, 2.0, (0.4, 0.6), 3.0, applied=True)
    (run,) = runs(None, 1, ["banded-ridge-4"], [OURS])
    record = execute(replace(run, budget=2.0, marks=(2.0,)))
    first, last = (
        o.model_copy(update={"unit": unit, "upper_loss": upper, "metrics": {"test_loss": test}, "incumbent": i})
        for i, (o, unit, upper, test) in enumerate(
            zip(record.observations, ((0.5, 0.5), (0.3, 0.7)), (1.0, 0.6), (1.1, 0.9), strict=True)
        )
    )
    steps = tuple(Step(number=i, shrinkage=found) for i, found in enumerate((None, shrinkage, None)))
    changes = {"observations": (first, last), "refits": {1: {"test_loss": 0.8}}, "steps": steps}
    others = record.model_copy(update={"observations": (first, first.model_copy(update={"upper_loss": 0.9}))})
    found = outcome(record.model_copy(update=changes), others)
    assert (found.upper, found.test, found.refit) == (0.6, 0.9, 0.8)
    assert found.measured == pytest.approx(0.3 - (0.1 + 0.2) / 2)
    assert found.predicted == pytest.approx(0.03 + 2 * 0.1 * (0.1 + 0.1))
    assert outcome(record.model_copy(update={**changes, "steps": ()})).predicted is None
    assert outcome(record.model_copy(update=changes)).measured is None


def test_results_of_a_search_are_trained_on_other_splits() -> None:
    wanted = runs(None, 4, ["digits-8"], [OURS, SHARED])
    record = execute(replace(wanted[0], budget=1.0, marks=()))
    by_split = {
        split: record.model_copy(
            update={"observations": (record.observations[0].model_copy(update={"unit": (split / 10,) * 8}),)}
        )
        for split in range(4)
    }
    found = not_chosen(wanted, {"digits-8": {OURS: by_split, SHARED: by_split}})
    assert [run.seed for run in found] == [0, 1, 2, 3]
    assert [run.problem.options["split_seed"] for run in found] == [1, 2, 3, 4]
    points = [[point[0] for point in run.method.settings["points"]] for run in found]
    assert points == [[0.1, 0.2], [0.2, 0.3], [0.3, 0.0], [0.0, 0.1]]
    trained = execute(found[0])
    assert [o.unit[0] for o in trained.observations] == [0.1, 0.2] and trained.status == "done"
    assert not_chosen(wanted, {"digits-8": {OURS: {0: by_split[0]}}}) == []


def test_a_simulation_is_trained_at_its_true_penalties() -> None:
    wanted = runs(None, 2, ["banded-ridge-4"], [OURS])
    record = execute(replace(wanted[0], budget=1.0, marks=()))
    one, _ = not_chosen(wanted, {"banded-ridge-4": {OURS: {0: record, 1: record}}})
    (trained,) = execute(one).observations
    problem = BandedRidge(groups=4, seed=1)
    assert trained.hyperparameters["decay"] == pytest.approx(problem.true_decays["decay"])


def test_the_tables_say_who_wins() -> None:
    ours = {s: Outcome(0.2, 0.2, 0.1 + 0.01 * s, 0.01, 0.02) for s in range(4)}
    shared = {s: Outcome(0.3, 0.2, 0.15 + 0.01 * s, None, 0.0) for s in range(4)}
    lowest = {s: Outcome(0.1, 0.3, 0.09 + 0.01 * s, 0.2, 0.1) for s in range(4)}
    text = report({"p": {OURS: ours, SHARED: shared, LOWEST: lowest}})
    lines = text.splitlines()
    assert "| p | 4 | 0.115 | **0.105** | 0.165 | - | - | - |" in lines
    (against_shared,) = (line for line in lines if line.startswith(f"| p | {SHARED} | 4 |"))
    (against_lowest,) = (line for line in lines if line.startswith(f"| p | {LOWEST} | 4 |"))
    assert against_shared.endswith("| 0.000 [0.000, 0.000] tie | 0.050 [0.050, 0.050] win |")
    assert against_lowest.endswith("| 0.100 [0.100, 0.100] win | -0.010 [-0.010, -0.010] loss |")
    gaps = [
        line.split(" | ")[-2:] for line in lines if line.startswith((f"| p | {OURS} | 0.0", f"| p | {LOWEST} | 0.2"))
    ]
    assert gaps == [["0.50", "yes |"], ["2.00", "yes |"]]
    assert f"{OURS}: 1 of 1 means are within a factor of two." in lines


def test_the_figure_of_the_optimism_has_a_point_for_each_problem() -> None:
    def of(predicted: float, measured: float) -> dict[int, Outcome]:
        return {s: Outcome(0.2, 0.2, None, predicted, measured + 0.001 * s) for s in range(3)}

    found = optimism_of({"p": {OURS: of(0.02, 0.01), LOWEST: of(0.03, -0.05)}, "q": {OURS: of(0.1, 0.02)}})
    assert [each.close for each in found] == [True, False, False]
    chart = calibration(found)
    ours, lowest = chart.series[-2:]
    assert ours.notes == ["p", "q"]
    assert (ours.x, ours.y) == (pytest.approx([0.02, 0.1]), pytest.approx([0.011, 0.021]))
    assert lowest.y == [LEAST_SHOWN] and ours.error is not None and min(ours.error) > 0
    assert "1 of 3 points" in chart.alt


@pytest.mark.parametrize(
    ("low", "high", "word"),
    [(0.02, 0.03, "yes"), (0.005, 0.015, "undecided"), (0.03, 0.06, "undecided"), (0.001, 0.009, "no"),
     (0.05, 0.06, "no"), (-0.01, 0.1, "undecided")],
)  # fmt: skip
def test_whether_a_gap_was_foreseen_is_judged_by_its_interval(low: float, high: float, word: str) -> None:
    assert agreement(0.02, Interval((low + high) / 2, low, high, 3)) == word


def test_a_benchmark_is_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--out", str(tmp_path), "--only", "digits-8", "--methods", f"{OURS};{SHARED}", "--splits", "1"]
    arguments += ["--workers", "1", "--cost", "3"]
    assert main(arguments) == 0
    assert "2 runs, 0 of them have a record" in capsys.readouterr().out
    assert main(arguments) == 0
    assert "2 runs, 2 of them have a record" in capsys.readouterr().out
    found, wrong = records.read_all(tmp_path)
    assert len(found) == 2 and not wrong
    assert "| digits-8 | one shared value | 1 |" in (tmp_path / "generalisation.md").read_text()
    assert (tmp_path / "figures" / "digits-8.svg").exists()
    drawn = pd.read_csv(tmp_path / "figures" / "digits-8.csv").groupby("series")["y"].last()
    refits = {r.method_name: r.refits[r.observations[-1].incumbent] for r in found}
    assert dict(drawn) == {name: metrics["test_loss"] for name, metrics in refits.items()}
    # All start points have equal hyperparameters, so that there is nothing to bring nearer together.
    assert {name: metrics.get("spread") for name, metrics in refits.items()} == {OURS: 1.0, SHARED: None}
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path), "--only", "nothing"])
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path), "--methods", "nothing"])
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path), "--cost", "0"])
