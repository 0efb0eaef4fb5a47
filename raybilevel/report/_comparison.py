"""Figures and tables of a comparison."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from raybilevel._records.incumbents import grouped, incumbent, loss_name
from raybilevel._records.names import OWN_METHODS
from raybilevel._records.record import Record
from raybilevel.report import _frames as frames
from raybilevel.report._charts import Chart, Series
from raybilevel.report._range import from_start
from raybilevel.report._statistics import Interval, PairedTest, holm, paired_test, rank
from raybilevel.report._tables import Table

ENOUGH_SEEDS = 5
"""For an interval over seeds to mean something."""

OWN = (*OWN_METHODS, *OWN_METHODS.values())


def method_order(records: Sequence[Record]) -> list[str]:
    """The methods' names: raybilevel's own first, then the others in alphabetical order."""
    methods = {r.method_name for r in records}
    own = [m for m in OWN if m in methods]
    return own + sorted(methods - set(own))


def unit_name(records: Sequence[Record]) -> str:
    unit = records[0].settings.budget_unit
    return "GPU-seconds" if unit == "gpu_seconds" else unit


# Figures.


def charts(records: Sequence[Record]) -> list[Chart]:
    """Anytime curves of each problem against cost and wall-clock time, and the overhead."""
    found = []
    order = method_order(records)
    for problem, members in grouped(records, "problem_name").items():
        found.append(anytime(problem, members, order, "spent"))
        found.append(anytime(problem, members, order, "seconds"))
    found.append(overhead(records, order))
    return [chart for chart in found if chart.series]


def anytime(problem: str, records: Sequence[Record], order: Sequence[str], axis: frames.Axis) -> Chart:
    """The best F so far: the mean over seeds, with its interval."""
    series, ends, intervals = [], {}, {}
    by_method = grouped(records, "method_name")
    for method in (m for m in order if m in by_method):
        data = frames.curve(by_method[method], axis)
        if data.empty:
            continue
        ends[method] = float(data["mean"].iloc[-1])
        several = len(by_method[method]) > 1
        if several:
            intervals[method] = float(data["low"].iloc[-1]), float(data["high"].iloc[-1])
        series.append(
            Series(
                method,
                "steps",
                data["x"].tolist(),
                data["mean"].tolist(),
                low=data["low"].tolist() if several else None,
                high=data["high"].tolist() if several else None,
                colour=order.index(method),
                strong=method in OWN,
            )
        )
    label, what = (unit_name(records), "cost") if axis == "spent" else ("seconds since the start", "wall-clock")
    best = min(ends, key=lambda m: ends[m], default="none")
    seeds = len({r.settings.seed for r in records})
    over = "one seed" if seeds == 1 else f"mean over {seeds} seeds with a 95 % bootstrap interval"
    told = ", ".join(f"{m} {v:.4g}" for m, v in sorted(ends.items(), key=lambda item: item[1]))
    everything = [y for s in series for y in s.y]
    # F need not be positive.
    log = bool(everything) and min(everything) > 0
    # From the median of what methods begin with; what stays above that is named, as its curve is not seen.
    bounds = from_start([s.y[0] for s in series], everything, log)
    above = [f"{m} ({v:.4g})" for m, v in ends.items() if bounds is not None and v > bounds[1]]
    outside = f" Above the axis to the end: {', '.join(above)}." if above else ""
    return Chart(
        name=f"{problem}-{'cost' if axis == 'spent' else 'time'}",
        title=f"{problem}: best F so far against {what}",
        caption=f"The lowest validation loss F up to each {'cost' if axis == 'spent' else 'time'}, {over}. Lower and "
        "further left is better. A curve begins where every seed has a training that ran to its end. "
        f"{charged(axis)}{outside}{in_the_end(ends, intervals, seeds)}",
        alt=f"Curves of the best validation loss of {len(series)} methods against {what}. At the end the lowest is "
        f"{best}. Final values: {told}.",
        x_label=label,
        y_label="best F so far",
        series=tuple(series),
        y_log=log,
        bounds=bounds,
    )


def in_the_end(ends: Mapping[str, float], intervals: Mapping[str, tuple[float, float]], seeds: int) -> str:
    """Which two methods are lowest at the end, and whether that may be luck.

    ends:      the mean F of each method.
    intervals: of those with several seeds.
    """
    if len(ends) < 2:
        return ""
    first, second = sorted(ends, key=lambda method: ends[method])[:2]
    if digits(ends[first]) == digits(ends[second]):
        return f" In the end {first} and {second} are equal ({digits(ends[first])})."
    order = f" In the end {first} is lowest ({ends[first]:.4g}), then {second} ({ends[second]:.4g})."
    if first not in intervals or second not in intervals:
        return f"{order} With one seed that may be luck."
    if intervals[first][1] >= intervals[second][0]:
        return f"{order} Their intervals overlap, so these seeds do not tell them apart."
    few = "" if seeds >= ENOUGH_SEEDS else f", but {seeds} seeds are few"
    return f"{order} Their intervals do not overlap{few}."


def charged(axis: frames.Axis) -> str:
    if axis == "spent":
        return "Epochs of stopped trainings and upper-level steps are charged."
    return "The start of workers, which every method waits for, is in it."


def overhead(records: Sequence[Record], order: Sequence[str]) -> Chart:
    """Seconds per run in trainings, in upper-level steps and in the searcher."""
    parts = ("trainings", "upper-level steps", "searcher")
    rows: dict[str, list[tuple[str, float, float]]] = {part: [] for part in parts}
    by_method = grouped([r for r in records if r.trials], "method_name")
    for method in (m for m in order if m in by_method):
        start = 0.0
        for part, value in zip(parts, seconds_of(by_method[method]), strict=True):
            rows[part].append((method, start, value))
            start += value
    lanes = tuple(m for m in order if m in by_method)
    series = tuple(
        Series(part, "spans", [b for _, b, _ in spans], [m for m, _, _ in spans], length=[v for _, _, v in spans],
               colour=number)
        for number, (part, spans) in enumerate(rows.items())
        if spans
    )  # fmt: skip
    shares = {m: share_outside(seconds_of(by_method[m])) for m in lanes}
    most = max(shares, key=lambda m: shares[m], default="none")
    follows = f" The largest share beside trainings is that of {most}, {shares[most]:.0%}." if shares else ""
    told = "; ".join(f"{m}: {', '.join(f'{v:.1f} s {p}' for p, v in zip(parts, seconds_of(by_method[m]), strict=True))}"
                     for m in lanes)  # fmt: skip
    return Chart(
        name="overhead",
        title="Where the time went",
        caption="Each bar is the mean time of a run, summed over all workers. Trainings include the start of their "
        "worker. Upper-level steps count from their start to their result, and the searcher with its CPU time. What is "
        f"beside trainings is the price of a method.{follows}",
        alt=f"Stacked bars of seconds per method. {told}.",
        x_label="seconds per run, over all workers",
        y_label="",
        series=series,
        lanes=lanes,
    )


def seconds_of(records: Sequence[Record]) -> tuple[float, float, float]:
    """Mean seconds in trainings, upper-level steps and the searcher."""
    trainings = [sum(sum(trial.took) for trial in r.trials) for r in records]
    upper = [r.overhead.upper_seconds or 0.0 for r in records if r.overhead is not None] or [0.0]
    searcher = [r.overhead.suggest_cpu_seconds for r in records if r.overhead is not None] or [0.0]
    return fmean(trainings), fmean(upper), fmean(searcher)


def share_outside(seconds: tuple[float, float, float]) -> float:
    """The share of a run's time that is not that of trainings."""
    trainings, *others = seconds
    return sum(others) / (trainings + sum(others) or 1.0)


# Tables.


def tables(records: Sequence[Record], everything: Sequence[Record]) -> list[Table]:
    """The winner table of each problem, ranks, paired tests, and the runs that failed.

    records:    of complete runs.
    everything: all records, with those that are not complete.
    """
    order = method_order(everything)
    found = []
    for problem, members in grouped(records, "problem_name").items():
        found.append(winners(problem, members, order))
    found += [ranks(records, order), tests(records)]
    missing = [r for r in everything if r.status != "done" or r.lowest is None]
    if missing:
        found.append(not_run(missing))
    return [table for table in found if table.rows]


def winners(problem: str, records: Sequence[Record], order: Sequence[str]) -> Table:
    """Test loss, refit, F at the marks, trainings and overhead of each method. The lowest losses are bold."""
    end = max(r.settings.budget for r in records)
    marks = [m for m in sorted(records[0].marks or [end / 2]) if m < end] + [end]
    loss = loss_name(records)
    has_refit = loss is not None and any(r.refits for r in records)
    unit = unit_name(records)
    tests = {} if loss is None else {loss.replace("_", " "): frames.metric(loss)}
    if has_refit and loss is not None:
        tests["after refit"] = frames.refitted(loss)
    headers = ["method", *tests, *(f"F at {m:g}" for m in marks)]
    headers += ["trainings", "stopped", "searcher s", "upper steps s", "wall s", "seeds"]
    by_method = grouped(records, "method_name")
    columns = [(value, end) for value in tests.values()] + [(frames.upper_loss, mark) for mark in marks]
    found = [{m: frames.at(members, value, mark) for m, members in by_method.items()} for value, mark in columns]
    best = [lowest(column) for column in found]
    rows = []
    for method in (m for m in order if m in by_method):
        texts = [cell(column[method]) for column in found]
        row = [f"**{text}**" if method == first else text for text, first in zip(texts, best, strict=True)]
        rows.append((method, *row, *counts(by_method[method])))
    dimension = len(records[0].space)
    return Table(
        f"{problem}-winners",
        f"{problem}: {dimension} hyperparameter{'s' if dimension > 1 else ''}, budget {end:g} {unit}",
        tuple(headers),
        tuple(rows),
        "Mean over seeds [95 % bootstrap interval], the lowest of each column in bold. F is the validation loss of the "
        "best training that ran to its end. The test loss is that of the same weights, and after refit that of its "
        "hyperparameters trained on training plus validation data. Of the trainings, some ran to their end and some a "
        "scheduler stopped. The seconds are those of the CPU within the searcher, and of upper-level steps from start "
        "to result.",
    )


def counts(records: Sequence[Record]) -> list[str]:
    status = [[o.status for o in r.observations] for r in records]
    overheads = [r.overhead for r in records if r.overhead is not None]
    return [
        f"{fmean(s.count('done') for s in status):.3g}",
        f"{fmean(s.count('stopped') for s in status):.3g}",
        number([o.suggest_cpu_seconds for o in overheads]),
        number([o.upper_seconds for o in overheads]),
        f"{fmean(r.seconds for r in records):.0f}",
        str(len(records)),
    ]


def number(values: Sequence[float | None]) -> str:
    found = [v for v in values if v is not None]
    return f"{fmean(found):.3g}" if found else "-"


def lowest(intervals: Mapping[str, Interval | None]) -> str | None:
    found = {method: interval.mean for method, interval in intervals.items() if interval is not None}
    return min(found, key=lambda m: found[m], default=None)


def final_losses(records: Sequence[Record]) -> dict[tuple[str, int], dict[str, float]]:
    """The final F by method, for each problem and seed; infinity if no training was completed."""
    blocks: dict[tuple[str, int], dict[str, float]] = {}
    for record in records:
        index = incumbent(record, record.settings.budget)
        value = None if index is None else frames.upper_loss(record, index)
        block = blocks.setdefault((record.problem_name, record.settings.seed), {})
        block[record.method_name] = math.inf if value is None else value
    return blocks


def ranks(records: Sequence[Record], order: Sequence[str]) -> Table:
    """The mean rank of each method over problems and seeds."""
    result = rank(list(final_losses(records).values()))
    rows = sorted(result.mean.items(), key=lambda item: item[1])
    friedman = "" if result.friedman is None else f" Friedman's test that all are alike: p = {result.friedman:.2g}."
    return Table(
        "ranks",
        "Ranks by final F",
        ("method", "mean rank", "first in"),
        tuple((m, f"{r:.2f}", f"{result.wins[m]} of {result.blocks}") for m, r in rows),
        f"Over {result.blocks} blocks (a problem with a seed) that have every method. Rank 1 is best.{friedman}",
    )


@dataclass(frozen=True)
class Comparison:
    problem: str
    own: str
    peer: str
    test: PairedTest


def comparisons(records: Sequence[Record]) -> list[Comparison]:
    """Compare each of raybilevel's own methods with the best peer of each problem, on the seeds that both have."""
    blocks, found = final_losses(records), []
    for problem in dict.fromkeys(name for name, _ in blocks):
        members = {seed: block for (name, seed), block in blocks.items() if name == problem}
        methods = dict.fromkeys(m for block in members.values() for m in block)
        means = {m: fmean(b[m] for b in members.values() if m in b) for m in methods}
        peers = {m: v for m, v in means.items() if not is_own(m, records)}
        if not peers:
            continue
        peer = min(peers, key=lambda m: peers[m])
        for own in (m for m in methods if is_own(m, records)):
            seeds = [
                s for s, block in sorted(members.items())
                if all(math.isfinite(block.get(m, math.inf)) for m in (own, peer))
            ]  # fmt: skip
            if seeds:
                test = paired_test([members[s][own] for s in seeds], [members[s][peer] for s in seeds])
                found.append(Comparison(problem, own, peer, test))
    return found


def is_own(method: str, records: Sequence[Record]) -> bool:
    """Whether a method is one of raybilevel's own, alone or with a scheduler."""
    # Not by the name in the config, which the user chooses.
    kinds = {r.settings.method for r in records if r.method_name == method}
    return any(kind.partition("+")[0] in OWN for kind in kinds)


def tests(records: Sequence[Record]) -> Table:
    """Paired tests, with Holm's correction over all of them."""
    found = comparisons(records)
    # Holm's correction counts only tests with a p-value. A single pair has none.
    with_p = [c for c in found if c.test.p is not None]
    corrected = dict(zip(map(id, with_p), holm([c.test.p for c in with_p if c.test.p is not None]), strict=True))
    rows = []
    for c in found:
        p = "-" if c.test.p is None else f"{c.test.p:.3g}"
        adjusted = f"{corrected[id(c)]:.3g}" if id(c) in corrected else "-"
        least = "-" if c.test.least is None else f"{c.test.least:.3g}"
        rows.append(
            (c.problem, c.own, c.peer, cell(c.test.difference), str(c.test.difference.count), p, adjusted, least)
        )
    return Table(
        "tests",
        "Against the best peer",
        ("problem", "method", "best peer", "difference in final F", "pairs", "p", "p, Holm", "least p"),
        tuple(rows),
        "The peer with the lowest mean final F of each problem, chosen after the fact, which favours the peers. "
        "Difference: mean over paired seeds [95 % bootstrap interval], negative where the method is better. p: exact "
        "sign-flip permutation test, two-sided, and corrected for all rows by Holm's method. least p: the "
        "smallest that so many pairs can give. Above 0.05, no difference is significant, however large.",
    )


def not_run(records: Sequence[Record]) -> Table:
    """Methods that are unavailable, and runs that failed or were interrupted."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for record in records:
        reasons = {"interrupted": "stopped by Ctrl-C", "done": "no training ran to its end within the budget"}
        why = record.error or reasons.get(record.status, "")
        where = f"{record.problem_name} seed {record.settings.seed}"
        rows.setdefault((record.method_name, record.status, why), []).append(where)
    return Table(
        "not-run",
        "Not run, or not to the end",
        ("method", "status", "reason", "where"),
        tuple((m, s, w, ", ".join(places)) for (m, s, w), places in rows.items()),
        "Methods that are unavailable, failed or were interrupted are in no other table.",
    )


def cell(interval: Interval | None) -> str:
    if interval is None:
        return "-"
    if interval.low is None or interval.high is None:
        return digits(interval.mean)
    return f"{digits(interval.mean)} [{digits(interval.low)}, {digits(interval.high)}]"


def digits(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "-"


# Words.


def conclusion(records: Sequence[Record]) -> list[str]:
    """For each problem which method did best on test data, and how sure that is."""
    found = []
    for problem, members in grouped(records, "problem_name").items():
        loss = loss_name(members)
        end = max(r.settings.budget for r in members)
        refit = loss is not None and any(r.refits for r in members)
        value = frames.upper_loss if loss is None else frames.refitted(loss) if refit else frames.metric(loss)
        what = "F" if loss is None else loss.replace("_", " ") + (" after the refit" if refit else "")
        means = {m: i.mean for m, runs in grouped(members, "method_name").items() if (i := frames.at(runs, value, end))}
        if means:
            ranked = [f"{m} {digits(mean)}" for m, mean in sorted(means.items(), key=lambda item: item[1])]
            found.append(f"{problem}: the lowest {what} is that of {', then '.join(ranked[:3])}.")
    least = [c.test.least for c in comparisons(records) if c.test.least is not None]
    if least and min(least) > 0.05:
        found.append("How sure: with so few seeds no test can tell methods apart.")
    return found
