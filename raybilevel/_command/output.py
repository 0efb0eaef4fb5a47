"""The output of the command after a run has ended or was stopped."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from raybilevel._records.names import CONFIG_FILE
from raybilevel.space import flatten

WITH_A_ROW = ("test_loss",)
"""Metrics that have a row of their own in the output."""


def show_how_to_go_on(
    console: Console, command: str, folder: Path, data: Path | None, address: str | None, storage: str | None
) -> None:
    """Print the command that resumes the run, quoted for a shell."""
    options = {"--out": folder, "--data": data, "--address": address, "--storage": storage}
    given = [str(word) for name, value in options.items() if value is not None for word in (name, value)]
    again = [
        sys.argv[0],
        command,
        str(folder / CONFIG_FILE),
        *given,
        "--resume",
    ]  # the saved config includes every --set
    console.print(f"  {shlex.join(again)}", markup=False, highlight=False, soft_wrap=True)


def show_result(console: Console, summary: dict[str, Any], folder: Path) -> None:
    """Print the best hyperparameters of a run, their losses, and the cost."""
    best = summary["best"]
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column()
    if best is not None:
        for path, value in flatten(best["hyperparameters"]).items():
            table.add_row("/".join(path), f"{value:.6g}")
        for key, label in (
            ("upper_loss", "F (validation loss)"),
            ("expected_upper_loss", "F there by the model, without luck"),
            ("test_loss", "test loss"),
            ("test_loss_refit", "test loss after a refit on all data"),
        ):
            if best[key] is not None:
                table.add_row(label, f"{best[key]:.5g}")
    others = [f"{name} {value:.4g}" for name, value in summary["metrics"].items() if name not in WITH_A_ROW]
    if others:
        table.add_row("metrics", ", ".join(others))
    failed = f", {summary['failed_trainings']} failed" if summary["failed_trainings"] else ""
    table.add_row("trainings", f"{summary['trainings']}{failed}; cost {summary['cost']:.1f} trainings in all")
    if summary["new_data"] is not None:
        table.add_row("new data", summary["new_data"]["in_words"])
    table.add_row("verdict", summary["verdict"])
    table.add_row("results", str(folder))
    console.print(table, highlight=False)
