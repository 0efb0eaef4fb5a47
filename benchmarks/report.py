"""Tables and figures from records alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from scipy.stats import t as student

from raybilevel._records.incumbents import grouped, incumbent, loss_name
from raybilevel._records.record import Record
from raybilevel.report._tables import markdown_table

Value = Callable[[Record, float], float | None]


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and the half-width of its 95 % t interval; None from one seed."""

    mean: float
    half: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        if len(values) < 2:
            return cls(values[0], None, 1)
        # Two-sided, with the degrees of freedom of the sample deviation.
        quantile = float(student.ppf(0.975, len(values) - 1))
        return cls(fmean(values), quantile * stdev(values) / len(values) ** 0.5, len(values))


def best_seen(records: Iterable[Record]) -> float | None:
    """F*: the lowest F of any record, or the known optimum where a problem has one; None where neither is there."""
    seen = (value for record in records for value in (record.lowest, record.optimum) if value is not None)
    return min(seen, default=None)


def upper_at(record: Record, cost: float) -> float | None:
    """F of the incumbent; None where the run was not carried on to this cost."""
    index = _incumbent(record, cost)
    return None if index is None else record.observations[index].upper_loss


def with_optimum(records: Sequence[Record]) -> list[Record]:
    """Records that know F*; where they do not, it is the best that any record of the problem has."""
    best = {name: best_seen(members) for name, members in grouped(records, "problem_name").items()}
    return [r if r.optimum is not None else r.model_copy(update={"optimum": best[r.problem_name]}) for r in records]


def regret_at(record: Record, cost: float) -> float | None:
    """(F - F*) / |F*| of the incumbent; None also where F* is not known."""
    upper, best = upper_at(record, cost), record.optimum
    return None if upper is None or best is None else (upper - best) / (abs(best) or 1.0)


def metric_at(name: str) -> Value:
    def value(record: Record, cost: float) -> float | None:
        index = _incumbent(record, cost)
        return None if index is None else record.observations[index].metrics.get(name)

    return value


def refit_at(record: Record, cost: float) -> float | None:
    index = _incumbent(record, cost)
    return None if index is None else record.refits.get(index, {}).get("test_loss")


def _incumbent(record: Record, cost: float) -> int | None:
    return incumbent(record, cost, "cost") if record.status == "done" else None


def markdown(
    records: Sequence[Record], marks: Sequence[float], wrong: Sequence[str] = (), shown: Sequence[float] = ()
) -> str:
    """An overview at the costs `shown` (all marks by default), and a section per problem: means over seeds."""
    records = with_optimum(records)
    end = max(r.settings.budget for r in records)
    marks = sorted({*(mark for mark in marks if mark < end), end})
    parts = [
        "# Benchmark of the algorithm",
        "Cost is counted in lower-level trainings; upper-level steps and linear solves by their gradient evaluations. "
        "F, its regret (F - F\\*)/|F\\*| and test losses are those of each method's incumbent; F\\* is the best F seen "
        "by any method, or the known optimum; where the seed decides the initial weights of networks, of each seed. "
        "Means over seeds, with 95 % t intervals. `-`: the budget ends before.",
        overview(records, shown or marks),
    ]
    for problem, members in grouped(records, "problem_name").items():
        parts.append(section(problem, members, marks))
    if wrong:
        parts += ["## Files that are not records", "\n".join(f"- {line}" for line in wrong)]
    return "\n\n".join(parts) + "\n"


def overview(records: Sequence[Record], marks: Sequence[float]) -> str:
    """Mean regret in percent: problems x methods, at the marks."""
    methods = list(grouped(records, "method_name"))
    rows = []
    for problem, members in grouped(records, "problem_name").items():
        by_method = grouped(members, "method_name")
        cells = [" / ".join(_percent(_mean(by_method.get(m, []), regret_at, mark)) for mark in marks) for m in methods]
        rows.append([problem, *cells])
    title = f"## Regret in percent, at cost {' / '.join(map(_plain, marks))}"
    return f"{title}\n\n{markdown_table(['problem', *methods], rows)}"


def section(problem: str, records: Sequence[Record], marks: Sequence[float]) -> str:
    best = sorted({r.optimum for r in records if r.optimum is not None})
    told = " to ".join(f"{value:.5g}" for value in dict.fromkeys([*best[:1], *best[-1:]])) or "unknown"
    settings, loss = records[0].settings, loss_name(records)
    options = ", ".join(f"{k} {v}" for k, v in settings.options.items())
    title = f"{settings.problem}{f' ({options})' if options else ''}"
    head = f"## {problem}\n\n{title}, d = {len(records[0].space)}, F\\* = {told}"
    headers = ["method"] + [f"F at {_plain(m)} (regret)" for m in marks]
    if loss is not None:
        headers += [f"{loss.replace('_', ' ')} at {_plain(m)}" for m in marks]
    if any(r.refits for r in records):
        headers += [f"after refit at {_plain(m)}" for m in marks]
    headers.append("note")
    rows = []
    for method, members in grouped(records, "method_name").items():
        row = [method]
        for mark in marks:
            regret = _mean(members, regret_at, mark)
            row.append(_cell(_mean(members, upper_at, mark)) + (f" ({_percent(regret)} %)" if regret else ""))
        if loss is not None:
            row += [_cell(_mean(members, metric_at(loss), mark)) for mark in marks]
        if any(r.refits for r in records):
            row += [_cell(_mean(members, refit_at, mark)) for mark in marks]
        rows.append([*row, _note(members)])
    return f"{head}\n\n{markdown_table(headers, rows)}"


def _note(records: Sequence[Record]) -> str:
    budget, seconds = max(r.settings.budget for r in records), fmean(r.seconds for r in records)
    failed = [r for r in records if r.status == "failed"]
    diverged = sum(o.status == "failed" for r in records for o in r.observations)
    parts = [f"{len(records)} seeds, budget {_plain(budget)}, {seconds:.0f} s a run"]
    if diverged:
        parts.append(f"{diverged} trainings diverged")
    if failed:
        parts.append(f"{len(failed)} FAILED: {failed[0].error}")
    return "; ".join(parts)


def _mean(records: Sequence[Record], value: Value, mark: float) -> Interval | None:
    found = [v for r in records if (v := value(r, mark)) is not None]
    return Interval.of(found) if found else None


def _percent(regret: Interval | None) -> str:
    if regret is None:
        return "-"
    return f"{100 * regret.mean:.3g}" if regret.mean < 10 else f"{100 * regret.mean:.0f}"


def _cell(interval: Interval | None) -> str:
    if interval is None:
        return "-"
    return f"{interval.mean:.4g}" + ("" if interval.half is None else f" ±{interval.half:.1g}")


def _plain(number: float) -> str:
    return f"{number:g}"


def figures(records: Sequence[Record], folder: Path) -> list[Path]:
    """Regret over cost, one SVG per problem: the mean over seeds, and the range of the seeds."""
    import matplotlib

    # Without a display.
    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    methods = sorted({r.method_name for r in records}, key=lambda m: (not m.startswith("default"), m))
    palette = pyplot.get_cmap("tab10")
    colour = {m: palette(i % 10) for i, m in enumerate(methods)}
    dashes = {m: "-" if i < 10 else "--" for i, m in enumerate(methods)}
    written = []
    for problem, members in grouped(with_optimum(records), "problem_name").items():
        figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
        for method in methods:
            runs = [r for r in members if r.method_name == method and r.status == "done"]
            if runs:
                costs, low, mean, high = curve(runs)
                width = 2.5 if method == "default" else 1.4
                axes.plot(
                    costs,
                    mean,
                    dashes[method],
                    drawstyle="steps-post",
                    label=method,
                    linewidth=width,
                    color=colour[method],
                )
                axes.fill_between(costs, low, high, step="post", alpha=0.12, linewidth=0, color=colour[method])
        axes.set(xlabel="cost (lower-level trainings)", ylabel="regret (F - F*) / |F*|", yscale="log")
        axes.set_title(f"{problem}: d = {len(members[0].space)}")
        axes.grid(alpha=0.3, which="both", linewidth=0.5)
        axes.legend(fontsize="small", ncols=2)
        path = folder / f"{problem}.svg"
        # Without a date equal data make equal files.
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)
        written.append(path)
    return written


def curve(runs: Sequence[Record]) -> tuple[list[float], list[float], list[float], list[float]]:
    """Costs, and least, mean and largest regret over the seeds there; from where every seed has an incumbent."""
    # As far as all runs go.
    end = min(r.settings.budget for r in runs)
    ends = {o.cost for r in runs for o in r.observations if o.cost <= end}
    # The axis is logarithmic, and the best run has a regret of 0.
    floor = 1e-6
    rows: list[tuple[float, float, float, float]] = []
    for cost in sorted({*ends, end}):
        values = [regret_at(r, cost) for r in runs]
        regrets = [max(floor, v) for v in values if v is not None]
        if len(regrets) == len(runs):
            rows.append((cost, min(regrets), fmean(regrets), max(regrets)))
    columns: Any = zip(*rows, strict=True) if rows else ([], [], [], [])
    costs, low, mean, high = (list(c) for c in columns)
    return costs, low, mean, high
