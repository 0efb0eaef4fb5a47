"""Figures of one run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from raybilevel._records.conclusion import in_words
from raybilevel._records.record import Hyperparameter, Observation, Record
from raybilevel._records.run_folder import search_of
from raybilevel._tree import leaves, named
from raybilevel.report import _frames as frames
from raybilevel.report import _front as front
from raybilevel.report import _search as search
from raybilevel.report._charts import Chart, Series
from raybilevel.report._range import from_start, marks_above

if TYPE_CHECKING:
    from raybilevel.search._state_file import SavedSearch

START_DESIGN, GIVEN = "start design", "given"
"""Where proposals came from, as figures name it; the trainings that a run starts with."""


def charts(record: Record, prefix: str = "") -> list[Chart]:
    """The figures of what was found. `prefix` distinguishes the files of several runs."""
    saved = search_of(record)
    found = [progress(record, prefix), path_of_incumbent(record, prefix)]
    if saved is not None:
        found = [*front.charts(saved, prefix), *found, *search.charts(saved, prefix)]
    return [chart for chart in found if chart.series]


def cost_charts(record: Record, prefix: str = "") -> list[Chart]:
    """The figures of where the time and the trainings went."""
    found = [timeline(record, prefix), cost_split(record, search_of(record), prefix)]
    return [chart for chart in found if chart.series]


def inside_charts(record: Record, prefix: str = "") -> list[Chart]:
    """The figures of the method's own numbers; none for other methods than raybilevel's."""
    saved = search_of(record)
    found = [] if saved is None else search.inside_charts(saved, prefix)
    return [chart for chart in found if chart.series]


def progress(record: Record, prefix: str) -> Chart:
    """F of each training, the best F so far, and the test loss of the incumbent."""
    done = [(i, o) for i, o in enumerate(record.observations) if o.upper_loss is not None]
    origins = origins_of(record)
    series, points = [], []
    # From 1, as colour 0 is that of the best so far.
    for number, origin in enumerate(dict.fromkeys(origins.get(o.trial, "training") for _, o in done), 1):
        chosen = [o for _, o in done if origins.get(o.trial, "training") == origin]
        notes = [describe(o.hyperparameters) for o in chosen]
        x, y = [o.cost for o in chosen], [frames.known(o.upper_loss) for o in chosen]
        points += list(zip(x, y, notes, strict=True))
        series.append(Series(origin, "points", x, y, colour=number, notes=notes))
    lowest = running_lowest(record)
    incumbents = [lowest[i] for i, _ in done]
    best = [frames.known(record.observations[i].upper_loss) for i in incumbents]
    costs = [o.cost for _, o in done]
    series.append(Series("best so far", "steps", costs, best, strong=True))
    tests = [record.observations[i].metrics.get("test_loss") for i in incumbents]
    if all(t is not None for t in tests) and tests:
        series.append(Series("test loss of the best", "steps", costs, tests, colour=7))
    everything = [y for s in series for y in s.y]
    log = bool(everything) and min(everything) > 0
    bounds = from_start(start_losses([o for _, o in done], origins), everything, log)
    marks = () if bounds is None else marks_above(bounds, log, points)
    above = f" The axis ends at the median of the start; {len(marks[0].x)} trainings lie above it." if marks else ""
    return Chart(
        name=f"{prefix}progress",
        title="Best F against cost",
        caption="Each point is a training, coloured by what proposed it. F is the validation loss at its weights. The "
        f"cost of upper-level steps is included, in trainings. The test loss takes no part in the search.{above}",
        alt=f"{len(done)} trainings; the best F falls from {best[0]:.4g} to {best[-1]:.4g}."
        if best
        else "No training.",
        x_label="cost, in trainings",
        y_label="loss",
        series=(*series, *marks),
        y_log=log,
        bounds=bounds,
    )


def start_losses(done: Sequence[Observation], origins: Mapping[str, str]) -> list[float]:
    """F at the start of a run: of its start design, or without one of the first quarter of its trainings. If there is a
    test loss, the one that is higher, so that both stay in view."""
    start = [o for o in done if origins.get(o.trial) in (START_DESIGN, GIVEN)] or done[: math.ceil(len(done) / 4)]
    return [max(frames.known(o.upper_loss), o.metrics.get("test_loss", -math.inf)) for o in start]


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
    names = {"start": START_DESIGN, "region": "trust region", "global": "whole box", "given": GIVEN,
             "fill": "space-filling", "unknown": "from elsewhere", "evaluated": "from earlier work"}  # fmt: skip
    origins = {trial: saved.state.trainings[index].proposal.origin for trial, index in saved.trials.items()}
    return {trial: names.get(origin, origin) for trial, origin in origins.items()}


def describe(hyperparameters: dict[str, Any]) -> str:
    flat = [f"{named(path)} = {in_words(value)}" for path, value in leaves(hyperparameters).items()]
    return "<br>".join([*flat[:8], *([f"and {len(flat) - 8} more"] if len(flat) > 8 else [])])


def path_of_incumbent(record: Record, prefix: str) -> Chart:
    """The hyperparameters of the incumbent over the run: in their unit if they share a scale, else as places."""
    done = [o for o in record.observations if o.upper_loss is not None]
    best = [record.observations[o.incumbent] for o in done]
    values = [{named(path): v for path, v in leaves(b.hyperparameters).items()} for b in best]
    # More than eight curves cannot be told apart: the palette has eight colours.
    moved = sorted(range(len(record.space)), key=lambda j: -spread([b.unit[j] for b in best]))[:8]
    shown = [(j, record.space[j]) for j in sorted(moved)]
    own_unit = share_a_scale([p for _, p in shown]) and all(is_number(v.get(p.name)) for v in values for _, p in shown)
    series = tuple(
        Series(name, "steps", [o.cost for o in done],
               [v[p.name] for v in values] if own_unit else [b.unit[j] for b in best],
               colour=number, notes=[in_words(v.get(p.name, "-")) for v in values])
        for number, ((j, p), name) in enumerate(zip(shown, search.short([p.name for _, p in shown]), strict=True))
    )  # fmt: skip
    left = f" The {len(shown)} that moved most of {len(record.space)}." if len(record.space) > len(shown) else ""
    how = "" if own_unit else ", from 0 at its lower bound to 1 at its upper bound, on the scale that is searched"
    return Chart(
        name=f"{prefix}path",
        title="Hyperparameters of the best so far",
        caption=f"Each hyperparameter of the training with the lowest F so far{how}.{left}",
        alt="Steps of " + ", ".join(f"{s.name} from {s.y[0]:.3g} to {s.y[-1]:.3g}" for s in series if s.y) + ".",
        x_label="cost, in trainings",
        y_label="value" if own_unit else "place in its interval",
        series=series,
        y_log=own_unit and shown[0][1].log,
        bounds=None if own_unit else (-0.03, 1.03),
    )


def share_a_scale(space: Sequence[Hyperparameter]) -> bool:
    """Whether hyperparameters can be read off one axis: all on a logarithmic one, or all with the same interval."""
    return all(p.log for p in space) or len({(p.low, p.high, p.log) for p in space}) == 1


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


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
