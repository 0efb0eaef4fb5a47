"""Whether many hyperparameters pay on new data: raybilevel with and without shrinkage, one shared value, black boxes.

    python -m benchmarks.generalisation --data DIR --out DIR

Each problem is run on ten splits of its data, or on three where a run takes longer, at a cost of 25 trainings or that
of `--cost`. The first table has the test loss after a refit. The second adds F, the test loss of the trained weights,
and the paired difference of the refit to raybilevel's. The third has the optimism of F: by how much the loss on new
data is higher, as a search expects it and as it is. A figure for each problem has the test loss after a refit over the
cost. DIR gets generalisation.md, figures/ and, in records/, every run. Those there are not run again.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.families import shown
from benchmarks.pool import run_all
from benchmarks.suite import MethodEntry, ProblemEntry, Run, box_of, make_problem
from raybilevel._models.shrinkage import expected_loss
from raybilevel._records import store as records
from raybilevel._records.incumbents import incumbent_at
from raybilevel._records.record import Observation, Record
from raybilevel.problems.banded_ridge import BandedRidge
from raybilevel.report._charts import Chart, Series
from raybilevel.report._static import write_figures
from raybilevel.report._statistics import Interval, bootstrap

COST = 25.0
MARKS = (0.12, 0.24, 0.4, 0.6, 1.0)
"""Shares of the cost at which figures have the refit of the result so far."""
MANY, FEW = 10, 3
"""Splits of the data."""
OURS, LOWEST, SHARED = "raybilevel", "raybilevel, lowest F", "one shared value"
EXPECTING = (OURS, LOWEST)
"""Methods that say what to expect of new data."""
OTHERS = 2
"""Splits whose results are trained on a split as well."""
LEAST_SHOWN = 1e-3
"""Of the optimism in the figure, whose axes are logarithmic."""

SHIFTED = {"train": 500, "validation": 500, "hidden": (50, 50, 50), "learning_rate": 0.1, "momentum": 0.9, "shift": 2}
"""A small network with augmented data."""


@dataclass(frozen=True)
class Data:
    """A problem of `benchmarks.suite` with its options, so many splits of its data, and the option that draws them."""

    problem: str
    options: Mapping[str, Any]
    splits: int = FEW
    seed: str = "split_seed"


PROBLEMS: dict[str, Data] = {
    "digits-8": Data("digits_logistic", {"groups": 8}, MANY),
    "digits-16": Data("digits_logistic", {"groups": 16}, MANY),
    "digits-64": Data("digits_logistic", {"groups": 64}, MANY),
    "cleaning-20": Data("cleaning", {}),
    "income-20": Data("income", {}),
    "income-elastic-40": Data("income", {"elastic": True}),
    "long-tail-20": Data("long_tail", {}),
    "newsgroups-15": Data("newsgroups", {}),
    "newsgroups-elastic-25": Data("newsgroups", {"elastic": True}),
    "mnist-shifted-4": Data("mnist", SHIFTED),
    # Each split is another simulation.
    "banded-ridge-4": Data("banded_ridge", {"groups": 4}, MANY, "seed"),
    "banded-ridge-20": Data("banded_ridge", {"groups": 20}, MANY, "seed"),
}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    OURS: ("default", {}),
    LOWEST: ("default", {"generalise": False}),
    SHARED: ("diagonal", {}),
    "Optuna TPE": ("optuna-tpe", {}),
    "Optuna GP": ("optuna-gp", {}),
    "random": ("random", {}),
}

T = TypeVar("T")
Done = dict[str, dict[str, dict[int, Record]]]
"""Records by problem, method and split."""


@dataclass(frozen=True)
class Outcome:
    """Of one run: F and test losses of its result, and what the search expected of new data.

    spread: of groups in the refit, relative to the result's; None of a method that does not choose it.
    predicted: by how much the search expects the loss on new data to exceed F; None where it says nothing.
    measured:  by how much it does, less the same at points that this F has not chosen (`not_chosen`). They are near, so
        that validation and test examples differ there as they do here. None without such trainings.
    """

    upper: float
    test: float
    refit: float | None
    predicted: float | None
    measured: float | None
    spread: float | None = None


def runs(
    data: str | None, splits: int | None, problems: Sequence[str], methods: Sequence[str], cost: float = COST
) -> list[Run]:
    """The splits outermost, so that a part of them is a fair comparison already.

    splits: of each problem; None for those of `PROBLEMS`.
    cost:   of each run.
    """
    found = []
    marks = tuple(share * cost for share in MARKS)
    for split in range(splits or max(PROBLEMS[problem].splits for problem in problems)):
        for problem in problems:
            given = PROBLEMS[problem]
            if split >= (splits or given.splits):
                continue
            # Split 0 is the other benchmark's.
            entry = ProblemEntry(problem=given.problem, options={**given.options, given.seed: split + 1})
            for method in methods:
                kind, settings = METHODS[method]
                searched = MethodEntry.model_validate({"method": kind, "settings": settings})
                found.append(Run(problem, entry, method, searched, split, cost, marks, data))
    return found


def not_chosen(wanted: Sequence[Run], done: Done) -> list[Run]:
    """Trainings on the split of each search at points near its result which that split has not chosen: results on the
    next splits, or, where these have other optima, what a simulation says of its own."""
    found = []
    for run in wanted:
        results = done.get(run.problem_name, {}).get(run.method_name, {})
        if run.method_name not in EXPECTING or run.seed not in results:
            continue
        problem = make_problem(run.problem, run.data)
        if isinstance(problem, BandedRidge):
            points = [tuple(box_of(problem).encode(problem.true_decays).tolist())]
        else:
            splits = sorted(results)
            after = splits.index(run.seed) + 1
            others = [*splits[after:], *splits[: after - 1]][:OTHERS]
            points = [result_of(results[split]).unit for split in others]
        if points:
            given = MethodEntry.model_validate({"method": "given", "settings": {"points": points}})
            name = elsewhere(run.method_name)
            found.append(replace(run, method_name=name, method=given, budget=float(len(points)), marks=()))
    return found


def elsewhere(method: str) -> str:
    """Of the trainings at points that its split has not chosen."""
    return f"{method}, elsewhere"


def gap(observation: Observation) -> float:
    """By how much the test loss exceeds F."""
    assert observation.upper_loss is not None
    return observation.metrics["test_loss"] - observation.upper_loss


def result_of(record: Record) -> Observation:
    index = incumbent_at(record.observations, record.settings.budget)
    assert index is not None
    return record.observations[index]


def outcome(record: Record, others: Record | None = None) -> Outcome:
    """others: of the run of `not_chosen`."""
    result = result_of(record)
    upper = result.upper_loss
    assert upper is not None
    learned = [step.shrinkage for step in record.steps if step.shrinkage is not None]
    predicted = expected_loss(learned[-1], result.unit, upper) - upper if learned else None
    beside = [gap(o) for o in others.observations if o.status == "done"] if others else []
    measured = gap(result) - statistics.fmean(beside) if beside else None
    refits = record.refits.get(record.observations.index(result), {})
    return Outcome(
        upper, result.metrics["test_loss"], refits.get("test_loss"), predicted, measured, refits.get("spread")
    )


def report(outcomes: Mapping[str, Mapping[str, Mapping[int, Outcome]]], cost: float = COST) -> str:
    """outcomes: by problem, method and split."""
    return "\n\n".join(
        [
            f"Test loss after a refit at cost {cost:g}, means over splits.",
            overview(outcomes),
            f"Means over splits at cost {cost:g} with 95 % bootstrap intervals. The spread is how far hyperparameters "
            "of a kind differ in the refit, relative to the result of the search. The last two columns are paired "
            "differences to raybilevel's: positive where raybilevel is better.",
            losses(outcomes),
            "By how much the loss on new data exceeds F, as the search expects and as measured: the test loss less F, "
            "less the same at points that this F has not chosen: results of other splits, or the true penalties.",
            optimism(optimism_of(outcomes)),
            "",
        ]
    )


def overview(outcomes: Mapping[str, Mapping[str, Mapping[int, Outcome]]]) -> str:
    """A row for each problem and a column for each method, the lowest mean of a row in bold."""
    lines = ["| problem | splits | " + " | ".join(METHODS) + " |", "| --- " * (len(METHODS) + 2) + "|"]
    for problem, methods in outcomes.items():
        refits = {m: [o.refit for o in splits.values() if o.refit is not None] for m, splits in methods.items()}
        means = {method: statistics.fmean(known) for method, known in refits.items() if known}
        least = min(means.values(), default=None)
        cells = [f"{means[m]:.3f}" if m in means else "-" for m in METHODS]
        bold = [f"**{cell}**" if least is not None and cell == f"{least:.3f}" else cell for cell in cells]
        lines.append(f"| {problem} | {max(map(len, methods.values()))} | " + " | ".join(bold) + " |")
    return "\n".join(lines)


def losses(outcomes: Mapping[str, Mapping[str, Mapping[int, Outcome]]]) -> str:
    lines = [
        "| problem | method | splits | F | test loss | after a refit | spread | test loss, less raybilevel's "
        "| refit, less raybilevel's |",
        "| --- " * 9 + "|",
    ]
    for problem, methods in outcomes.items():
        for method, splits in methods.items():
            ours = {} if method == OURS else methods.get(OURS, {})
            cells = [mean(splits, attrgetter(name)) for name in ("upper", "test", "refit", "spread")]
            cells += [above(splits, ours, attrgetter(name)) for name in ("test", "refit")]
            lines.append(f"| {problem} | {method} | {len(splits)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def above(splits: Mapping[int, T], ours: Mapping[int, T], value: Callable[[T], float | None]) -> str:
    """The difference to raybilevel's, by splits, and the word for it."""
    paired = [(value(splits[split]), value(ours[split])) for split in splits if split in ours]
    differences = [other - own for other, own in paired if other is not None and own is not None]
    return judged(bootstrap(differences)) if differences else ""


def judged(difference: Interval) -> str:
    """With the word for it: an interval beyond 0 is a win or a loss. A single split decides nothing."""
    low, high = difference.low, difference.high
    if low is None or high is None:
        return shown(difference)
    return f"{shown(difference)} {'win' if low > 0 else 'loss' if high < 0 else 'tie'}"


def figure(problem: str, methods: Mapping[str, Sequence[Record]]) -> Chart | None:
    """Test loss after a refit over the cost, from where every split has a result; None for a problem without refits.

    methods: the records of a problem, by method; a record for each split.
    """
    series, told = [], []
    for method, found in methods.items():
        points = []
        for mark in found[0].marks:
            values = [value for record in found if (value := refit_at(record, mark)) is not None]
            if len(values) == len(found):
                points.append((mark, bootstrap(values)))
        if points:
            low, high = ([interval.ends[side] for _, interval in points] for side in (0, 1))
            marks, means = [mark for mark, _ in points], [interval.mean for _, interval in points]
            colour = list(METHODS).index(method)
            series.append(Series(method, "steps", marks, means, low, high, colour=colour, strong=method == OURS))
            told.append(f"{method} {means[-1]:.3f}")
    if not series:
        return None
    splits = max(len(found) for found in methods.values())
    cost = max(found[0].settings.budget for found in methods.values())
    dimension = len(next(iter(methods.values()))[0].space)
    return Chart(
        name=problem,
        title=f"{problem}: {dimension} hyperparameters, {splits} splits of the data",
        caption="The result so far, trained on all data. Bands are 95 % bootstrap intervals of the mean.",
        alt=f"Test loss after a refit at cost {cost:g}: " + ", ".join(told) + ".",
        x_label="cost, in training runs (gradients of the search are charged)",
        y_label="test loss after a refit",
        series=tuple(series),
    )


def refit_at(record: Record, mark: float) -> float | None:
    index = incumbent_at(record.observations, mark)
    return None if index is None else record.refits.get(index, {}).get("test_loss")


def mean(splits: Mapping[int, Outcome], value: Callable[[Outcome], float | None]) -> str:
    known = [found for outcome in splits.values() if (found := value(outcome)) is not None]
    return shown(bootstrap(known)) if known else "-"


@dataclass(frozen=True)
class Optimism:
    """By how much the loss on new data exceeds F at the result of a method, expected by the search and measured."""

    problem: str
    method: str
    expected: Interval
    measured: Interval

    @property
    def ratio(self) -> float | None:
        """Of the means; None where that of the measured is not positive."""
        return self.expected.mean / self.measured.mean if self.measured.mean > 0 else None

    @property
    def close(self) -> bool:
        return self.ratio is not None and 0.5 <= self.ratio <= 2


def optimism_of(outcomes: Mapping[str, Mapping[str, Mapping[int, Outcome]]]) -> list[Optimism]:
    found = []
    for problem, methods in outcomes.items():
        for method in EXPECTING:
            pairs = [(o.predicted, o.measured) for o in methods.get(method, {}).values()]
            known = [(one, other) for one, other in pairs if one is not None and other is not None]
            if known:
                expected, measured = (bootstrap(values) for values in zip(*known, strict=True))
                found.append(Optimism(problem, method, expected, measured))
    return found


def optimism(found: Sequence[Optimism]) -> str:
    lines = ["| problem | result of | expected | measured | ratio | within a factor of two |", "| --- " * 6 + "|"]
    for each in found:
        ratio = "-" if each.ratio is None else f"{each.ratio:.2f}"
        lines.append(
            f"| {each.problem} | {each.method} | {shown(each.expected)} | {shown(each.measured)} | {ratio} "
            f"| {agreement(each.expected.mean, each.measured)} |"
        )
    for method in EXPECTING:
        if own := [each for each in found if each.method == method]:
            close = sum(each.close for each in own)
            lines += ["", f"{method}: {close} of {len(own)} means are within a factor of two."]
    return "\n".join(lines)


def calibration(found: Sequence[Optimism]) -> Chart:
    """The measured optimism over the expected one, a point for each problem."""
    ends = [min(each.expected.mean for each in found) / 1.5, max(each.expected.mean for each in found) * 1.5]
    lines = tuple(
        Series(name, "line", ends, [factor * end for end in ends], colour=7, in_legend=factor == 1)
        for name, factor in (("half", 0.5), ("as expected, half and twice as much", 1.0), ("twice", 2.0))
    )
    points = []
    for colour, method in enumerate(EXPECTING):
        if not (own := [each for each in found if each.method == method]):
            continue
        at = [max(each.measured.mean, LEAST_SHOWN) for each in own]
        errors = [(each.measured.ends[1] - each.measured.ends[0]) / 2 for each in own]
        expected, notes = [each.expected.mean for each in own], [each.problem for each in own]
        points.append(Series(method, "points", expected, at, error=errors, colour=colour, notes=notes))
    close = sum(each.close for each in found)
    return Chart(
        name="optimism",
        title="By how much the loss on new data exceeds F",
        caption="A point for each problem, the mean over splits of its data, with 95 % bootstrap intervals. "
        f"What is below {LEAST_SHOWN} is drawn at the lower edge.",
        alt=f"Measured over expected optimism of F; {close} of {len(found)} points are within a factor of two.",
        x_label="expected by the search",
        y_label="measured",
        series=(*lines, *points),
        x_log=True,
        y_log=True,
        bounds=(LEAST_SHOWN, 2 * max(each.measured.ends[1] for each in found)),
    )


def agreement(expected: float, measured: Interval) -> str:
    """Whether a gap that was expected is within a factor of two of the measured one: yes, no, or, where the interval
    reaches both sides of that limit, undecided."""
    low, high = measured.ends
    if 2 * low >= expected >= high / 2:
        return "yes"
    return "no" if high < expected / 2 or low > 2 * expected else "undecided"


def recorded(wanted: Sequence[Run], out: Path, workers: int) -> tuple[Done, int]:
    """Records of all runs, of which those that are missing are run, and how many failed."""
    run_all(wanted, out, workers)
    done: Done = {}
    failed = 0
    for run in wanted:
        record = records.read(out / run.path)
        if record.status == "done":
            done.setdefault(run.problem_name, {}).setdefault(run.method_name, {})[run.seed] = record
        else:
            failed += 1
    return done, failed


def main(arguments: Sequence[str] | None = None) -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generalisation", description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="folder of the data files")
    parser.add_argument(
        "--out", required=True, type=Path, help="folder of records and table; an earlier run is resumed"
    )
    parser.add_argument("--splits", type=int, help=f"of the data of each problem, by default {MANY} or {FEW}")
    parser.add_argument("--cost", type=float, default=COST, help="of each run, in trainings, %(default)g by default")
    parser.add_argument("--only", default=",".join(PROBLEMS), help="problems, comma-separated")
    parser.add_argument("--methods", default=";".join(METHODS), help="semicolon-separated, as their names have commas")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args(arguments)
    problems, methods = options.only.split(","), options.methods.split(";")
    for what, names, known in (("problem", problems, PROBLEMS), ("method", methods, METHODS)):
        if unknown := [name for name in names if name not in known]:
            parser.error(f"no {what} {unknown[0]!r}; choose from {', '.join(known)}")
    if options.cost < 1:
        parser.error(f"--cost must be 1 or more, got {options.cost:g}")
    data = str(Path(options.data).expanduser().absolute()) if options.data else None
    wanted = runs(data, options.splits, problems, methods, options.cost)
    done, failed = recorded(wanted, options.out, options.workers)
    others, failed_elsewhere = recorded(not_chosen(wanted, done), options.out, options.workers)
    failed += failed_elsewhere
    outcomes = {
        problem: {
            method: {s: outcome(r, others.get(problem, {}).get(elsewhere(method), {}).get(s)) for s, r in of.items()}
            for method, of in methods.items()
        }
        for problem, methods in done.items()
    }
    text = report(outcomes, options.cost)
    drawn = [figure(name, {m: list(found.values()) for m, found in methods.items()}) for name, methods in done.items()]
    if gaps := optimism_of(outcomes):
        drawn.append(calibration(gaps))
    write_figures([chart for chart in drawn if chart is not None], options.out / "figures")
    return told(text, options.out / "generalisation.md", failed)


def told(text: str, file: Path, failed: int) -> int:
    """The exit status, when the table is written and printed."""
    file.write_text(text, encoding="utf-8")
    print(text)
    if failed:
        print(f"{failed} runs failed", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
