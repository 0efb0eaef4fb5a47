"""Searches on networks trained by SGD and AdamW, judged by what their results are worth under other seeds.

    python -m benchmarks.networks --data DIR --out DIR

F at the end of such a training is partly chance, and a search takes the lowest it has seen. So the result at each mark
is trained again under six other seeds. The table has F as the search has seen it, the mean F and test loss of these
trainings, and the paired difference of that F to raybilevel's. Each seed has its own initial weights and, but for the
published split of MNIST 1K, its own split of the data. DIR gets networks.md and, in records/, every run. Those there
are not run again.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from benchmarks.generalisation import Done, above, recorded, told
from benchmarks.suite import MethodEntry, ProblemEntry, Run
from raybilevel._metrics import UPPER_LOSS
from raybilevel._records.incumbents import incumbent_at
from raybilevel._records.record import Record

SEEDS = 5
FIRST_SEED = 11
"""No other benchmark has these."""
RETRAININGS = 6
OURS = "raybilevel"


@dataclass(frozen=True)
class Search:
    """A problem of `benchmarks.suite` with its options, and the costs at which a search is judged.

    has_split: whether the seed draws the split of its data.
    """

    problem: str
    options: dict[str, Any]
    marks: tuple[float, ...]
    has_split: bool = False


SEARCHES: dict[str, Search] = {
    "mnist-1k-1": Search("mnist_1k", {"share": "all"}, (5, 10, 20)),
    "mnist-1k-2": Search("mnist_1k", {"share": "layer"}, (5, 10, 20)),
    "mnist-1k-10": Search("mnist_1k_kinds", {}, (5, 10, 20)),
    "lenet-5": Search("cifar_lenet", {"train": 1000, "validation": 1000, "test": 1000}, (10, 30), has_split=True),
    "regularised-8": Search("regularised_network", {}, (10, 30), has_split=True),
}
METHODS = {OURS: "default", "random": "random", "Optuna TPE": "optuna-tpe", "Optuna GP": "optuna-gp"}


def runs(data: str | None, seeds: int, searches: Sequence[str], methods: Sequence[str]) -> list[Run]:
    """The seeds outermost, so that a part of them is a fair comparison already."""
    found = []
    for seed in range(FIRST_SEED, FIRST_SEED + seeds):
        for name in searches:
            search = SEARCHES[name]
            options = {**search.options, **({"split_seed": seed} if search.has_split else {})}
            problem = ProblemEntry(problem=search.problem, options=options)
            for method in methods:
                entry = MethodEntry.model_validate({"method": METHODS[method]})
                *marks, budget = search.marks
                found.append(Run(name, problem, method, entry, seed, budget, tuple(marks), data, RETRAININGS))
    return found


@dataclass(frozen=True)
class Outcome:
    """Of one search at one cost: F as it was seen; means of F and of the test loss under other seeds."""

    seen: float
    upper: float
    test: float


def outcome(record: Record, mark: float) -> Outcome:
    """Raises ValueError, where no training of the result has come to its end."""
    index = incumbent_at(record.observations, mark)
    again = record.retrained.get(index, ()) if index is not None else ()
    if index is None or not again:
        raise ValueError(f"{record.problem_name}, {record.method_name}, seed {record.settings.seed}: no result")
    seen = record.observations[index].upper_loss
    assert seen is not None
    upper, test = (statistics.fmean(one[name] for one in again) for name in (UPPER_LOSS, "test_loss"))
    return Outcome(seen, upper, test)


def rows(done: Done) -> Iterator[str]:
    """A row of the table for each search, cost and method."""
    for problem, methods in done.items():
        for mark in SEARCHES[problem].marks:
            outcomes = {
                method: {seed: outcome(record, mark) for seed, record in found.items()}
                for method, found in methods.items()
            }
            for method, found in outcomes.items():
                ours = {} if method == OURS else outcomes.get(OURS, {})
                against = above(found, ours, attrgetter("upper"))
                seen, upper, test = (
                    statistics.fmean(getattr(one, name) for one in found.values()) for name in ("seen", "upper", "test")
                )
                yield (
                    f"| {problem} | {mark:g} | {method} | {len(found)} | {seen:.3f} | {upper:.3f} | {test:.3f} "
                    f"| {against} |"
                )


def report(done: Done) -> str:
    return "\n".join(
        [
            f"Means over seeds: F and test loss of the result under {RETRAININGS} other seeds of the training. The "
            "last column is that F less raybilevel's, paired, with its 95 % bootstrap interval: positive where "
            "raybilevel is better.",
            "",
            "| problem | cost | method | seeds | F as seen | F | test loss | F, less raybilevel's |",
            "| --- " * 8 + "|",
            *rows(done),
            "",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(prog="python -m benchmarks.networks", description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="folder of the data files")
    parser.add_argument("--out", required=True, type=Path, help="folder of records and table; a run is resumed")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="how many, by default %(default)s")
    parser.add_argument("--only", nargs="+", choices=SEARCHES, default=tuple(SEARCHES), metavar="NAME")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=tuple(METHODS), metavar="NAME")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args(arguments)
    data = str(Path(options.data).expanduser().absolute()) if options.data else None
    done, failed = recorded(runs(data, options.seeds, options.only, options.methods), options.out, options.workers)
    return told(report(done), options.out / "networks.md", failed)


if __name__ == "__main__":
    sys.exit(main())
