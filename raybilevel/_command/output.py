"""The output of the command after a run has ended or was stopped."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from raybilevel._records.conclusion import in_words
from raybilevel._tree import leaves, named

WITH_A_LINE = ("test_loss",)
"""Metrics that are in the conclusion."""


def again(*arguments: object) -> str:
    """A call of this command, as it was called, quoted for a shell."""
    script = Path(sys.argv[0])
    # With `python -m raybilevel` argv has the path of that file, which does not run by itself.
    called = [sys.executable, "-m", "raybilevel"] if script.name == "__main__.py" else [str(script)]
    return shlex.join([*called, *map(str, arguments)])


def show_how_to_go_on(console: Console, folder: Path) -> None:
    """Print the command that resumes a run or a comparison."""
    show(console, f"  {again('resume', folder)}")


def show(console: Console, line: str) -> None:
    """Print a line as it is. It is not broken, so that it can be copied."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def show_result(console: Console, summary: Mapping[str, Any], folder: Path, verbose: bool = False) -> None:
    """Print what was found, whether it helped and how sure that is, then the cost, and where everything is."""
    if verbose:
        console.print(details(summary), highlight=False)
    for line in summary["in_words"]:
        console.print(line, highlight=False, markup=False)
    console.print()
    if metrics := ", ".join(f"{k} {v:.4g}" for k, v in summary["metrics"].items() if k not in WITH_A_LINE):
        console.print(f"Metrics: {metrics}", highlight=False, markup=False)
    failed = f", {summary['failed_trainings']} of which failed" if summary["failed_trainings"] else ""
    steps = f" and {summary['upper_steps']} upper-level steps" if summary["upper_steps"] else ""
    show(console, f"Cost: {summary['cost']:.1f} trainings, for {summary['trainings']} trainings{failed}{steps}")
    show(console, f"Results: {folder}")
    show(console, f"Report: {again('report', folder)}")
    show(console, f"More trainings: {again('resume', folder, '--trainings', 2 * summary['trainings'])}")


def details(summary: Mapping[str, Any]) -> Table:
    """Every hyperparameter of the best training, and the measures of the method."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column()
    if summary["best"] is not None:
        for path, value in leaves(summary["best"]["hyperparameters"]).items():
            table.add_row(named(path), in_words(value))
    for name, measure in summary["diagnostics"].items():
        if measure is not None:
            table.add_row(name.replace("_", " "), f"{measure:.3g}")
    table.add_row("verdict", summary["verdict"])
    return table


def print_json(content: Any) -> None:
    """For programs, on standard output."""
    sys.stdout.write(json.dumps(content, indent=2, allow_nan=False, default=str) + "\n")
