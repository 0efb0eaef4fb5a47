"""Figures and tables of one run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from raybilevel._metrics import UPPER_LOSS
from raybilevel._records.conclusion import in_words
from raybilevel._records.record import Observation, Record
from raybilevel._records.run_folder import search_of
from raybilevel._tree import leaves, named
from raybilevel.report import _search as search
from raybilevel.report._charts import Chart, Series
from raybilevel.report._tables import Table

if TYPE_CHECKING:
    from raybilevel.search._state_file import SavedSearch


def charts(record: Record, prefix: str = "") -> list[Chart]:
    """All figures for which the record has data. `prefix` distinguishes the files of several runs."""
    found = [progress(record, prefix), path_of_incumbent(record, prefix)]
    saved = search_of(record)
    if saved is not None:
        found += search.charts(saved, prefix)
    found += [timeline(record, prefix), cost_split(record, saved, prefix)]
    return [chart for chart in found if chart.series]


def progress(record: Record, prefix: str) -> Chart:
    """F of each training, the best F so far, and the test loss of the incumbent."""
    done = [(i, o) for i, o in enumerate(record.observations) if o.upper_loss is not None]
    origins = origins_of(record)
    series = []
    # From 1, as colour 0 is that of the best so far.
    for number, origin in enumerate(dict.fromkeys(origins.get(o.trial, "training") for _, o in done), 1):
        chosen = [(i, o) for i, o in done if origins.get(o.trial, "training") == origin]
        notes = [describe(o.hyperparameters) for _, o in chosen]
        series.append(
            Series(origin, "points", [o.cost for _, o in chosen], [o.upper_loss for _, o in chosen], colour=number,
                   notes=notes)
        )  # fmt: skip
    lowest = running_lowest(record)
    incumbents = [lowest[i] for i, _ in done]
    best = [record.observations[i].upper_loss for i in incumbents]
    costs = [o.cost for _, o in done]
    series.append(Series("best so far", "steps", costs, best, strong=True))
    tests = [record.observations[i].metrics.get("test_loss") for i in incumbents]
    if all(t is not None for t in tests) and tests:
        series.append(Series("test loss of the best", "steps", costs, tests, colour=7))
    everything = [y for s in series for y in s.y]
    return Chart(
        name=f"{prefix}progress",
        title="F of each training",
        caption="Validation loss F at the trained weights against cost, in trainings with upper-level steps charged; "
        "points by where the proposal came from. The test loss takes no part in the search.",
        alt=f"{len(done)} trainings; the best F falls from {best[0]:.4g} to {best[-1]:.4g}."
        if best
        else "No training.",
        x_label="cost, in trainings",
        y_label="loss",
        series=tuple(series),
        y_log=bool(everything) and min(everything) > 0,
    )


def running_lowest(record: Record) -> list[int]:
    """At the end of each training the position of the one with the lowest F so far; of the feasible ones, if any is."""
    ranks = (
        (o.feasible is False, math.inf if o.upper_loss is None else o.upper_loss, place)
        for place, o in enumerate(record.observations)
    )
    found: Iterator[tuple[bool, float, int]] = accumulate(ranks, min)
    return [place for _, _, place in found]


def origins_of(record: Record) -> dict[str, str]:
    saved = search_of(record)
    if saved is None:
        return {}
    names = {"start": "start design", "region": "trust region", "global": "whole box", "given": "given",
             "fill": "space-filling", "unknown": "from elsewhere", "evaluated": "from earlier work"}  # fmt: skip
    origins = {trial: saved.state.trainings[index].proposal.origin for trial, index in saved.trials.items()}
    return {trial: names.get(origin, origin) for trial, origin in origins.items()}


def describe(hyperparameters: dict[str, Any]) -> str:
    flat = [f"{named(path)} = {in_words(value)}" for path, value in leaves(hyperparameters).items()]
    return "<br>".join([*flat[:8], *([f"and {len(flat) - 8} more"] if len(flat) > 8 else [])])


def path_of_incumbent(record: Record, prefix: str) -> Chart:
    """The hyperparameters of the incumbent over the run, each within its interval."""
    done = [o for o in record.observations if o.upper_loss is not None]
    names = [p.name for p in record.space]
    best = [record.observations[o.incumbent] for o in done]
    # More than eight curves cannot be told apart: the palette has eight colours.
    shown = sorted(range(len(names)), key=lambda j: -spread([b.unit[j] for b in best]))[:8]
    series = tuple(
        Series(names[j], "steps", [o.cost for o in done], [b.unit[j] for b in best], colour=number)
        for number, j in enumerate(sorted(shown))
    )
    left = f" The {len(shown)} that moved most of {len(names)}." if len(names) > len(shown) else ""
    return Chart(
        name=f"{prefix}path",
        title="Path of the incumbent",
        caption="Each hyperparameter of the best training so far, from 0 at its lower bound to 1 at its upper bound, "
        f"on the scale that is searched.{left}",
        alt="Steps of "
        + ", ".join(f"{s.name} from {s.y[0]:.2f} to {s.y[-1]:.2f}" for s in series if s.y)
        + ", in shares of the interval.",
        x_label="cost, in trainings",
        y_label="place in its interval",
        series=series,
        bounds=(-0.03, 1.03),
    )


def spread(values: Sequence[float]) -> float:
    return max(values) - min(values) if values else 0.0


def timeline(record: Record, prefix: str) -> Chart:
    """The trials on each worker, and the upper-level steps, over time."""
    spans: dict[str, list[tuple[str, float, float, str]]] = {}
    workers: dict[tuple[str, int], str] = {}
    for trial in record.trials:
        gpus = f", GPU {trial.gpus}" if trial.gpus else ""
        # A process number is unique on its node only.
        lane = workers.setdefault((trial.node, trial.pid), f"{trial.node} worker {len(workers) + 1}{gpus}")
        for begin, end in stretches(trial.seconds, trial.took):
            spans.setdefault(trial.status, []).append((lane, begin, end - begin, f"trial {trial.trial}"))
    lanes = list(workers.values())
    for step in record.steps:
        if step.began is not None and step.ended is not None:
            spans.setdefault("upper-level step", []).append(
                ("upper level", step.began, step.ended - step.began, f"step {step.number}")
            )
    if "upper-level step" in spans:
        lanes.append("upper level")
    colours = {"done": 0, "stopped": 4, "failed": 1, "cut": 3, "upper-level step": 2}
    series = tuple(
        Series(name, "spans", [b for _, b, _, _ in members], [lane for lane, _, _, _ in members],
               length=[length for _, _, length, _ in members], notes=[note for _, _, _, note in members],
               colour=colours.get(name, 7))
        for name, members in spans.items()
    )  # fmt: skip
    return Chart(
        name=f"{prefix}timeline",
        title="Trials over time",
        caption="Each bar is a trial on the worker that ran it; the first epoch includes the start of the worker. "
        "Upper-level steps are shown where their times are known.",
        alt=f"{sum(len(m) for m in spans.values())} bars on {len(lanes)} lanes over {record.seconds:.0f} seconds.",
        x_label="seconds since the start",
        y_label="",
        series=series,
        lanes=tuple(lanes),
    )


def stretches(seconds: Sequence[float], took: Sequence[float]) -> list[tuple[float, float]]:
    """Bars (begin, end) of consecutive epochs. A pause of at least a second ends a bar."""
    bars: list[tuple[float, float]] = []
    for end, length in zip(seconds, took, strict=True):
        begin = max(0.0, end - length)
        if bars and begin - bars[-1][1] < 1.0:
            bars[-1] = (bars[-1][0], end)
        else:
            bars.append((begin, end))
    return bars


def cost_split(record: Record, saved: SavedSearch | None, prefix: str) -> Chart:
    """The parts of the cost, in trainings."""
    observed = record.observations
    counts = {"trainings": 0.0, "stopped trainings": 0.0, "failed trainings": 0.0}
    epochs = {trial.trial: len(trial.epochs) for trial in record.trials}
    for o in observed:
        # A comparison charges a failed training by its epochs. A search or the benchmark charges a whole training.
        whole = o.status == "done" or (o.status == "failed" and record.kind != "comparison")
        name = "trainings" if o.status == "done" else f"{o.status} trainings"
        counts[name] += 1.0 if whole else epochs.get(o.trial, 0) / record.epochs_per_training
    if saved is not None and saved.state.done:
        unit = saved.state.passes_per_training
        counts["upper-level steps"] = sum(step.passes for step in saved.state.steps) / unit
    start, series = 0.0, []
    for number, (name, amount) in enumerate(counts.items()):
        if amount > 0:
            series.append(Series(name, "spans", [start], ["cost"], length=[amount], colour=number))
            start += amount
    return Chart(
        name=f"{prefix}cost",
        title="What it cost",
        caption="In trainings: stopped ones by their epochs, upper-level steps by their gradient evaluations.",
        alt="; ".join(f"{name}: {amount:.1f}" for name, amount in counts.items() if amount > 0) + ", in trainings.",
        x_label="trainings",
        y_label="",
        series=tuple(series),
        lanes=("cost",),
    )


# Tables.


def tables(record: Record) -> list[Table]:
    """The result of a run, and the trainings that became the incumbent."""
    done = [
        (o.number if o.number is not None else place, o)
        for place, o in enumerate(record.observations, 1)
        if o.upper_loss is not None
    ]
    return [result(record, record.observations[-1].incumbent), improvements(done)] if done else []


def result(record: Record, best: int) -> Table:
    """The losses, hyperparameters and diagnostics of the incumbent, whose position is `best`."""
    incumbent = record.observations[best]
    name = "F (validation loss)" if record.metric == UPPER_LOSS else record.metric
    rows = [(name, f"{incumbent.upper_loss:.6g}")]
    if incumbent.feasible is not None:
        rows.append(("keeps the constraints", "yes" if incumbent.feasible else "no"))
    rows += [(name.replace("_", " "), f"{value:.6g}") for name, value in incumbent.metrics.items()]
    refit = record.refits.get(best, {})
    rows += [(f"{name.replace('_', ' ')} after refit", f"{value:.6g}") for name, value in refit.items()]
    rows += [(named(path), in_words(value)) for path, value in leaves(incumbent.hyperparameters).items()]
    rows.append(("cost, in trainings", f"{record.observations[-1].cost:.1f}"))
    if record.verdict:
        rows.append(("verdict", record.verdict))
    for name, measure in record.diagnostics.items():
        if measure is not None and math.isfinite(measure):
            rows.append((name.replace("_", " "), f"{measure:.3g}"))
    return Table("result", "Result", ("what", "value"), tuple(rows), "Of the training that the method returns.")


def improvements(done: Sequence[tuple[int, Observation]]) -> Table:
    """The completed trainings that were better than all before them, with their numbers; of those that keep the
    constraints, if there are any."""
    rows: list[tuple[str, ...]] = []
    lowest = math.inf
    for number, o in done:
        if o.feasible is False or o.upper_loss is None or not o.upper_loss < lowest:
            continue
        lowest = o.upper_loss
        test_loss = o.metrics.get("test_loss")
        told = "-" if test_loss is None else f"{test_loss:.5g}"
        rows.append((str(number), f"{o.cost:.1f}", f"{o.upper_loss:.5g}", told))
    return Table("improvements", "Improvements", ("training", "cost", "F", "test loss"), tuple(rows))
