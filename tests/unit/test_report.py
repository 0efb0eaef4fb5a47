"""A report of real records: short runs of the in-process benchmark on a problem with a known optimum."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.suite import MethodEntry, ProblemEntry, Run, execute
from raybilevel._records import store as records
from raybilevel._records.record import Observation, Overhead, Record, TrialLog
from raybilevel.errors import DataError, RaybilevelError
from raybilevel.report import _comparison as comparison
from raybilevel.report import _frames as frames
from raybilevel.report import _single as single
from raybilevel.report._charts import Chart, Series, Surface
from raybilevel.report._page import drawing, render, sections_of
from raybilevel.report._sources import read_folder
from raybilevel.report._tables import Table, table_csv

pytest.importorskip("plotly", reason="the extra `report` is not installed")

METHODS, SEEDS, BUDGET = ("default", "random", "diagonal"), (0, 1), 6.0


@pytest.fixture(scope="module")
def runs() -> list[tuple[Run, Record]]:
    problem = ProblemEntry(problem="ridge", options={"groups": 2})
    found = []
    for seed in SEEDS:
        for method in METHODS:
            run = Run("ridge-2", problem, method, MethodEntry(method=method), seed, BUDGET, (3,), None)
            found.append((run, execute(run)))
    return found


@pytest.fixture(scope="module")
def written(runs: list[tuple[Run, Record]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with its report; for tests that only look."""
    from raybilevel import report

    folder = tmp_path_factory.mktemp("written")
    for run, record in runs:
        records.write(folder / run.path, record)
    assert report.write(folder) == folder / "report.html"
    return folder


def page_of(folder: Path) -> str:
    source = read_folder(folder)
    return render(source, sections_of(source), drawing())


@pytest.fixture
def folder(runs: list[tuple[Run, Record]], tmp_path: Path) -> Path:
    for run, record in runs:
        records.write(tmp_path / run.path, record)
    return tmp_path


def test_one_page_holds_everything_and_asks_for_nothing(written: Path) -> None:
    text = (written / "report.html").read_text()
    before_the_library = text.split("<noscript>")[0]
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", before_the_library)
    assert '<link rel="stylesheet"' not in text
    names = re.findall(r'data-figure="([^"]+)"', text)
    assert {"ridge-2-cost", "ridge-2-time"} <= set(names)
    assert len(names) == len(set(names))
    files = {"ridge-2-cost", "ridge-2-time"}  # those of single runs of other methods are in the page only
    for name in names:
        found = re.search(rf'id="data-{re.escape(name)}">(.*?)</script>', text, re.DOTALL)
        assert found is not None and json.loads(found[1])["data"]
        for ending in ("svg", "png", "csv"):
            assert (written / "figures" / f"{name}.{ending}").is_file() == (name in files)
    labels = re.findall(r'role="img" aria-label="([^"]*)"', text)
    assert len(labels) == len(names) and all(len(label) > 20 for label in labels)
    assert "&lt;b&gt;" not in text and re.search(r"<b>0\.\d+", text)  # the winner is bold


def test_tables_are_written_as_csv_and_markdown(written: Path) -> None:
    folder = written
    with (folder / "tables" / "ridge-2-winners.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["default", "diagonal", "random"]
    text = (folder / "tables" / "tables.md").read_text()
    assert "| default |" in text and "## Ranks by final F" in text and "p, Holm" in text
    with (folder / "tables" / "observations.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(frames.observations(read_folder(folder).good))


def test_a_notebook_gets_frames_and_figures(folder: Path, runs: list[tuple[Run, Record]]) -> None:
    from raybilevel import report

    loaded = report.load(folder)
    count = sum(len(record.observations) for _, record in runs)
    assert len(loaded.observations) == count
    assert {"problem", "method", "seed", "upper_loss", "best_upper_loss", "cost", "config/decay/g0"} <= set(
        loaded.observations.columns
    )
    last = loaded.observations.groupby(["method", "seed"])["best_upper_loss"].last()
    for run, record in runs:
        uppers = [o.upper_loss for o in record.observations]
        assert last[run.method_name, run.seed] == pytest.approx(min(uppers))
    assert type(loaded.figures["ridge-2-cost"]).__name__ == "Figure"
    assert "ranks" in loaded.tables


def test_the_curve_is_the_mean_of_the_best_so_far(runs: list[tuple[Run, Record]]) -> None:
    members = [record for run, record in runs if run.method_name == "random"]
    data = frames.curve(members, "spent")
    assert data["mean"].is_monotonic_decreasing
    best = [min(o.upper_loss for o in r.observations if o.cost <= 4) for r in members]
    at = data[data["x"] <= 4].iloc[-1]
    assert at["mean"] == pytest.approx(sum(best) / 2)
    assert (at["low"], at["high"]) == pytest.approx((min(best), max(best)))
    assert data["x"].iloc[-1] == BUDGET


@pytest.mark.parametrize(
    ("ends", "intervals", "seeds", "words"),
    [
        ({"a": 0.5, "b": 0.4, "c": 0.9}, {}, 1, "b is lowest (0.4), then a (0.5). With one seed that may be luck."),
        (
            {"a": 0.5, "b": 0.4},
            {"a": (0.45, 0.55), "b": (0.3, 0.46)},
            5,
            "b is lowest (0.4), then a (0.5). Their intervals overlap, so these seeds do not tell them apart.",
        ),
        (
            {"a": 0.5, "b": 0.4},
            {"a": (0.45, 0.55), "b": (0.38, 0.42)},
            5,
            "b is lowest (0.4), then a (0.5). Their intervals do not overlap.",
        ),
        (
            {"a": 0.5, "b": 0.4},
            {"a": (0.45, 0.55), "b": (0.38, 0.42)},
            2,
            "b is lowest (0.4), then a (0.5). Their intervals do not overlap, but 2 seeds are few.",
        ),
    ],
)
def test_a_caption_says_what_follows_from_the_curves(ends: Any, intervals: Any, seeds: int, words: str) -> None:
    assert comparison.in_the_end(ends, intervals, seeds) == f" In the end {words}"
    assert comparison.in_the_end({"a": 0.5}, {}, 1) == ""


def test_a_caption_names_no_first_of_two_equal_methods() -> None:
    words = comparison.in_the_end({"a": 0.500001, "b": 0.5, "c": 0.9}, {}, 1)
    assert words == " In the end b and a are equal (0.5)."


def test_figures_of_a_comparison_say_what_is_seen_and_what_follows(runs: list[tuple[Run, Record]]) -> None:
    for chart in comparison.charts([record for _, record in runs]):
        assert chart.caption.startswith("The lowest validation loss F up to each ")
        assert " In the end " in chart.caption and ";" not in chart.caption
    found = [
        record.model_copy(update={"trials": (TrialLog(trial="t", took=(2.0, 1.0)),), "overhead": overhead})
        for (_, record), overhead in zip(runs, [Overhead(upper_seconds=1.0), *[Overhead()] * 5], strict=True)
    ]
    caption = comparison.overhead(found, METHODS).caption
    assert re.search(r"What is beside trainings is the price of a method\. .* is that of default, 14%\.$", caption)


def test_the_paired_test_is_against_the_peer_with_the_lowest_mean(runs: list[tuple[Run, Record]]) -> None:
    found = comparison.comparisons([record for _, record in runs])
    assert [c.own for c in found] == ["default"]
    blocks = comparison.final_losses([record for _, record in runs])
    means = {m: sum(b[m] for b in blocks.values()) / 2 for m in ("random", "diagonal")}
    assert found[0].peer == min(means, key=lambda m: means[m])
    difference = sum(b["default"] - b[found[0].peer] for b in blocks.values()) / 2
    assert found[0].test.difference.mean == pytest.approx(difference)


def test_test_losses_come_first_and_the_best_of_each_column_is_bold(runs: list[tuple[Run, Record]]) -> None:
    found = [record for _, record in runs]
    table = comparison.winners("ridge-2", found, METHODS)
    assert table.headers[:4] == ("method", "test loss", "F at 3", "F at 6")
    for column, header in enumerate(table.headers[1:4], 1):
        bold = [row[0] for row in table.rows if row[column].startswith("**")]
        means = {row[0]: float(row[column].split(" [")[0]) for row in table.plain_rows}
        assert len(bold) == 1 and means[bold[0]] == min(means.values()), header
    first, sure = comparison.conclusion(found)
    means = {row[0]: float(row[1].split(" [")[0]) for row in table.plain_rows}
    assert first.startswith(f"ridge-2: the lowest test loss is that of {min(means, key=means.__getitem__)} ")
    assert sure == "How sure: with so few seeds no test can tell methods apart."


def test_a_curve_that_stays_above_the_axis_is_named(runs: list[tuple[Run, Record]]) -> None:
    _, record = runs[0]

    def ending(method: str, losses: tuple[float, ...]) -> Record:
        observations = tuple(
            o.model_copy(update={"upper_loss": f, "incumbent": n})
            for n, (o, f) in enumerate(zip(record.observations, losses, strict=False))
        )
        return record.model_copy(update={"method_name": method, "observations": observations})

    records = [ending("a", (4.0, 1.0)), ending("b", (4.0, 2.0)), ending("c", (900.0, 800.0))]
    chart = comparison.anytime("ridge-2", records, ["a", "b", "c"], "spent")
    assert chart.bounds is not None and 0.8 < chart.bounds[0] < 1.0 and 4.0 < chart.bounds[1] < 5.0
    assert "Above the axis to the end: c (800)." in chart.caption


def test_what_did_not_end_well_is_named_and_in_no_average(folder: Path) -> None:
    from raybilevel import report

    paths = sorted((folder / "records" / "ridge-2").glob("*.json"))
    record = records.read(paths[0])
    failed = tuple(o.model_copy(update={"upper_loss": None, "status": "failed"}) for o in record.observations)
    changes: dict[str, Any]
    for name, changes in (
        ("ax", {"status": "unavailable", "error": "AxSearch is broken", "observations": ()}),
        ("odd", {"status": "failed", "error": "ValueError: no"}),
        ("slow", {"observations": failed}),
    ):
        other = record.model_copy(update={"method_name": name, **changes})
        records.write(folder / "records" / "ridge-2" / f"{name}.json", other)
    half = folder / "records" / "ridge-2" / "half.json"
    half.write_text(paths[0].read_text()[:200])
    former = folder / "records" / "ridge-2" / "former.json"
    former.write_text(json.dumps({**json.loads(paths[0].read_text()), "format": 1}))
    loaded = report.load(folder)
    missing = loaded.tables["not-run"].set_index("method")["reason"].to_dict()
    assert missing == {
        "ax": "AxSearch is broken", "odd": "ValueError: no", "slow": "no training ran to its end within the budget",
    }  # fmt: skip
    winners = loaded.tables["ridge-2-winners"].set_index("method")
    assert set(winners.index) == {*METHODS, "slow"}
    assert winners.loc["slow", "F at 6"] == "-"
    assert len(loaded.wrong) == 2
    assert "former.json: a record of format 1; this version reads format 2" in loaded.wrong[0]
    assert "half.json: half-written or damaged" in loaded.wrong[1]
    assert "half.json" in page_of(folder)


def test_a_run_with_a_failed_training_is_reported(folder: Path) -> None:
    from raybilevel import report

    path = next(path for path in (folder / "records" / "ridge-2").glob("default-seed0-*.json"))
    record = records.read(path)
    best = {o.incumbent for o in record.observations}
    number = next(n for n in range(len(record.observations)) if n not in best)
    before, other, after = record.observations[:number], record.observations[number], record.observations[number + 1 :]
    failed = Observation(
        status="failed", unit=other.unit, hyperparameters=other.hyperparameters, cost=other.cost,
        incumbent=other.incumbent,
    )  # fmt: skip
    path.write_text(record.model_copy(update={"observations": (*before, failed, *after)}).model_dump_json())
    assert report.write(folder).is_file()
    loaded = report.load(folder)
    frame = loaded.observations
    own = frame[(frame["method"] == "default") & (frame["seed"] == 0)]
    assert own["status"].tolist()[number] == "failed"
    names = {trace.name: trace.x for trace in loaded.figures["ridge-2-default-seed-0-cost"].data}
    assert list(names["failed trainings"]) == [1.0]  # the benchmark charges it in full


def test_a_metric_with_the_name_of_a_column_is_kept_beside_it(runs: list[tuple[Run, Record]]) -> None:
    _, record = runs[0]
    first = record.observations[0].model_copy(update={"metrics": {"status": 3.0, "mine": 4.0}})
    row = frames.observations([record.model_copy(update={"observations": (first,)})]).iloc[0]
    assert (row["status"], row["metric/status"], row["mine"]) == ("done", 3.0, 4.0)


def test_a_folder_of_neither_kind_is_refused(tmp_path: Path) -> None:
    from raybilevel import report

    with pytest.raises(DataError, match="neither the folder of a comparison"):
        report.write(tmp_path)
    (tmp_path / "records" / "x").mkdir(parents=True)
    (tmp_path / "records" / "x" / "a.json").write_text("{")
    with pytest.raises(DataError, match=r"no whole record in it; .*a\.json"):
        report.load(tmp_path)


def test_nothing_to_report_is_said(folder: Path) -> None:
    from raybilevel import report

    for path in (folder / "records" / "ridge-2").glob("*.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "observations": []}))
    with pytest.raises(RaybilevelError, match="no training ran to its end yet"):
        report.write(folder)


def test_text_from_records_cannot_break_out_of_the_page(folder: Path) -> None:
    path = sorted((folder / "records" / "ridge-2").glob("*.json"))[0]
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "method_name": "</script><script>alert(1)</script>"}))
    assert "<script>alert(1)" not in page_of(folder)


def test_a_chart_gives_all_that_it_draws_as_data() -> None:
    series = Series("a", "steps", [1, 2], [3.0, 4.0], low=[2.0, 3.0], high=[4.0, 5.0])
    surface = Surface("v", [0.0, 1.0], [0.0, 2.0], [[1.0, 2.0], [3.0, 4.0]])
    data = Chart("n", "t", "c", "alt", "x", "y", (series,), surface).data()
    assert len(data) == 2 + 4
    assert data.loc[(data["x"] == 1.0) & (data["y"] == 2.0), "z"].tolist() == [4.0]


def test_epochs_that_follow_each_other_are_one_bar() -> None:
    assert single.stretches([1.0, 2.0, 9.0], [1.0, 0.9, 2.0]) == [(0.0, 2.0), (7.0, 9.0)]


def test_table_csv_is_without_the_marks_of_bold() -> None:
    table = Table("n", "t", ("a", "b"), (("x, y", "**1**"),))
    assert table_csv(table) == 'a,b\n"x, y",1\n'
