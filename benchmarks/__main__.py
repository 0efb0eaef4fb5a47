"""python -m benchmarks CONFIG --data DIR --out DIR: run what is missing, then report."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.pool import run_all
from benchmarks.suite import Run, Suite, read_suite
from raybilevel._records import store as records
from raybilevel._records.incumbents import grouped
from raybilevel._records.record import Record
from raybilevel.errors import ConfigError, DataError, RaybilevelError


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        suite = narrowed(read_suite(options.config), options)
        out = Path(options.out)
        runs = suite.runs(str(Path(options.data).expanduser().absolute()) if options.data else None)
    except RaybilevelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not options.report_only:
        run_all(runs, out, suite.workers, tuple(filter(None, options.redo.split(","))))
    return summarise(runs, suite, out)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("config")
    parser.add_argument("--data", help="folder of the data files")
    parser.add_argument("--out", required=True, help="folder of records, table and figures; an earlier run is resumed")
    parser.add_argument("--only", help="problems, comma-separated")
    parser.add_argument("--methods", help="methods, comma-separated")
    parser.add_argument("--budget", type=float, help="largest cost of a run")
    parser.add_argument("--seeds", type=int, help="seeds of every problem and method, whatever the config says")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--redo", default="", help="methods whose records are to be made anew, comma-separated")
    parser.add_argument("--report-only", action="store_true", help="run nothing, report what is there")
    return parser


def narrowed(suite: Suite, options: argparse.Namespace) -> Suite:
    """The suite with the command line's choices.

    Raises:
        ConfigError: a problem or method is not in the config, or a number makes no sense.
    """
    problems = _chosen("problem", suite.problems, options.only)
    methods = _chosen("method", suite.methods, options.methods)
    for number in (options.budget, options.seeds, options.workers):
        if number is not None and not number > 0:
            raise ConfigError(f"budget, seeds and workers must be positive, got {number}")
    for name, problem in problems.items():
        changes: dict[str, Any] = {"caps": {m: c for m, c in problem.caps.items() if m in methods}}
        if problem.methods is not None:
            changes["methods"] = tuple(m for m in problem.methods if m in methods)
        if options.budget is not None:
            changes["budget"] = min(options.budget, problem.budget or suite.budget)
        if options.seeds is not None:
            changes["seeds"] = options.seeds
        problems[name] = problem.model_copy(update=changes)
    if options.seeds is not None:
        methods = {name: method.model_copy(update={"seeds": None}) for name, method in methods.items()}
    changes = {"problems": problems, "methods": methods}
    changes |= {k: v for k in ("seeds", "workers") if (v := getattr(options, k)) is not None}
    return suite.model_copy(update=changes)


def _chosen(kind: str, known: dict[str, Any], names: str | None) -> dict[str, Any]:
    if names is None:
        return dict(known)
    for name in names.split(","):
        if name not in known:
            raise ConfigError(f"no {kind} {name!r} in the config; it has {', '.join(known)}")
    return {name: known[name] for name in names.split(",")}


def summarise(runs: Sequence[Run], suite: Suite, out: Path) -> int:
    """Table and figures of the suite's records; F* is over all records of a problem, whatever the method."""
    found, wrong = [], []
    for run in runs:
        try:
            if (out / run.path).exists():
                found.append(records.read(out / run.path))
        except DataError as error:
            wrong.append(str(error))
    if not found:
        print("no records to report", file=sys.stderr)
        return 1
    everything, _ = records.read_all(out)
    for position, record in enumerate(found):
        # F* is over all records of the folder, those of methods that were left out of this call included.
        alike = rivals(record, everything, suite.problems[record.problem_name].by_seed)
        found[position] = record.model_copy(update={"optimum": report.best_seen(alike)})
    for name, members in grouped(found, "problem_name").items():
        best = sorted({r.optimum for r in members if r.optimum is not None})
        print(f"{name}: F* = {', '.join(f'{value:.6g}' for value in best)}")
    text = report.markdown(found, suite.marks, wrong, suite.overview)
    (out / "table.md").write_text(text, encoding="utf-8")
    drawn = report.figures(found, out / "figures")
    print(text)
    print(f"{out / 'table.md'}, {len(drawn)} figures in {out / 'figures'}")
    print(f"{len(found)} runs, {sum(r.seconds for r in found) / 60:.0f} minutes on one core in all")
    failed = [r for r in found if r.status != "done"]
    if failed or len(found) < len(runs):
        print(f"{len(failed)} runs failed, {len(runs) - len(found)} are missing", file=sys.stderr)
        return 1
    return 0


def rivals(record: Record, records: Sequence[Record], by_seed: bool) -> list[Record]:
    """The records of the same problem, whatever the config calls it; of the same seed only where that decides F*."""
    return [
        r
        for r in records
        if (r.settings.problem, r.settings.options) == (record.settings.problem, record.settings.options)
        and (not by_seed or r.settings.seed == record.settings.seed)
    ]


if __name__ == "__main__":
    sys.exit(main())
