"""`raybilevel compare`: all runs that lack a good record, one after another on one cluster, and then the tables."""

from __future__ import annotations

import functools
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich.table
import yaml
from rich import box
from rich.console import Console
from rich.text import Text

from raybilevel._compare.config import CompareConfig, Run, read_comparison
from raybilevel._config.plan import Plan
from raybilevel._own_problem import is_own
from raybilevel._records import store as records
from raybilevel._records.names import CONFIG_FILE, RECORDS_FOLDER
from raybilevel._records.record import Record
from raybilevel.errors import ConfigError, DataError

if TYPE_CHECKING:
    from raybilevel.report._tables import Table

MAY_CHANGE = {"seeds", "marks", "cpus", "only"}
"""Keys of a comparison that change none of its records."""


def prepare(config: CompareConfig, out: Path, resume: bool) -> None:
    """Set up or check the output folder. It never mixes the records of two comparisons.

    Raises:
        ConfigError: the folder already holds a comparison, or has none to resume, or holds another one.
    """
    saved = out / CONFIG_FILE
    if resume:
        if not saved.is_file():
            raise ConfigError(f"--resume: there is no comparison in {out}; leave --resume out to begin one")
        begun = read_comparison(saved)
        if begun.model_dump(exclude=MAY_CHANGE) != config.model_dump(exclude=MAY_CHANGE):
            raise ConfigError(
                f"--resume: the config differs from the one in {saved}, with which the comparison began; only "
                f"{', '.join(sorted(MAY_CHANGE))} may change"
            )
        write_config(config, saved)
        return
    if (out / RECORDS_FOLDER).exists():
        raise ConfigError(f"{out} already holds a comparison; choose another --out, or go on with it by --resume")
    write_config(config, saved)


def write_config(config: CompareConfig, saved: Path) -> None:
    try:
        saved.parent.mkdir(parents=True, exist_ok=True)
        saved.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write to {saved.parent}: {error.strerror or error}") from error


def settled(path: Path, say: Callable[[str], None]) -> bool:
    """Whether a run has a good record. A damaged, failed, interrupted or cut-off one is reported, and the run is done
    again."""
    try:
        part = records.left_over(path)
        if part is not None:
            # The process died during the run. What it had recorded stays for inspection, and is not continued.
            say(f"{path.name}: cut off after {len(part.observations)} trainings, which are set aside; it is done again")
        if not path.exists():
            return False
        record = records.read(path)
    except DataError as error:
        say(f"{error}; it is set aside and done again")
        return False
    if record.status != "done":
        say(f"{path.name}: {record.status}{reason_of(record)}; it is done again")
        return False
    return True


def run_all(
    runs: Sequence[Run],
    out: Path,
    address: str | None,
    cpus: int | None,
    console: Console,
    storage: str | None = None,
) -> tuple[int, bool]:
    """Do all runs without a good record. Returns how many still lack one, and whether the user interrupted.

    storage: a folder or URI for the trials of the current run; by default a folder of this machine.

    Raises:
        ConfigError: the cluster has several nodes and no storage is given, or this machine lacks the resources of a
            run.
        ProblemError, SpaceError, DataError: a problem, which is named, has a mistake. Nothing was run.
        StorageError: the storage cannot be written, or nodes of the cluster do not see it.
    """
    # Imported here, as they import Ray, which takes seconds, and `--help` and mistakes in a config do without.
    from raybilevel._cluster.own_code import send_along
    from raybilevel._cluster.resources import nodes_alive
    from raybilevel._cluster.storage import check_access, locate
    from raybilevel._command.cluster import cluster
    from raybilevel._command.resources import check_room
    from raybilevel._compare.execute import execute

    def say(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True, markup=False)

    missing = [run for run in runs if not settled(out / run.path, say)]
    say(f"{len(runs)} runs, {len(runs) - len(missing)} of them have a record")
    if not missing:
        return 0, False
    plans: dict[str, Plan] = {}  # all of them before the first run, so that a mistake is reported at once
    for run in missing:
        if run.problem_name not in plans:
            plans[run.problem_name] = run.plan()
    for plan in plans.values():
        if is_own(plan.config.problem):
            send_along(type(plan.problem))
    bad, began = 0, time.monotonic()
    place = None if storage is None else locate(storage)
    with cluster(address, cpus, say) as alone:
        for plan in plans.values():
            check_room(plan.training, plan.step, alone)
        if place is not None:
            check_access(place)
        elif len(nodes_alive()) > 1:
            raise ConfigError(
                "the cluster has several nodes, which exchange checkpoints while a run is under way: give --storage, a "
                "folder that all of them mount, or a URI (s3://bucket/folder)"
            )
        for number, run in enumerate(missing, 1):
            head = f"[{number}/{len(missing)}] {run.problem_name} {run.method_name} seed {run.seed}"
            try:
                with Progress(console, head, run) as progress:
                    keep = functools.partial(records.keep, out / run.path)
                    record = execute(run, plans[run.problem_name], progress.update, keep, place)
            except KeyboardInterrupt:  # the second Ctrl-C: the record so far stays, and the run is done again later
                return bad + len(missing) - number + 1, True
            records.write(out / run.path, record)
            bad += record.status not in ("done", "unavailable")
            say(f"{head}: {outcome(record)}  ({time.monotonic() - began:.0f} s in all)")
            if record.status == "interrupted":
                return bad + len(missing) - number, True
    return bad, False


class Progress:
    """One line on a terminal with the progress of a run; nothing if the output is not a terminal."""

    def __init__(self, console: Console, head: str, run: Run) -> None:
        self.console, self.head, self.budget = console, head, run.budget
        self.status = console.status(self._line(0.0, math.nan), spinner="line") if console.is_terminal else None

    def __enter__(self) -> Progress:
        if self.status is not None:
            self.status.start()
        return self

    def __exit__(self, *raised: object) -> None:
        if self.status is not None:
            self.status.stop()

    def update(self, ledger: Any) -> None:
        if self.status is not None:
            best = ledger.best
            self.status.update(self._line(ledger.spent(), math.nan if best is None else best.upper_loss))

    def _line(self, spent: float, best: float) -> Text:
        shown = "-" if math.isnan(best) else f"{best:.4g}"
        unit = self.budget.unit.replace("_", "-")
        return Text(f"{self.head}: {spent:.1f} of {self.budget.amount:g} {unit}, best F {shown}")


def outcome(record: Record) -> str:
    """A record in one line."""
    if record.status == "unavailable":
        return f"unavailable{reason_of(record)}"
    if record.status == "failed":
        return f"FAILED{reason_of(record)}"
    lowest = record.lowest
    told = "no training ran to its end" if lowest is None else f"best F {lowest:.5g}"
    counts = Counter(observation.status for observation in record.observations)
    others = "".join(f", {counts[status]} {status}" for status in ("stopped", "failed") if counts[status])
    text = f"{told}, {counts['done']} trainings{others}, {record.seconds:.0f} s"
    return f"interrupted; {text}" if record.status == "interrupted" else text


def reason_of(record: Record) -> str:
    return f" ({record.error})" if record.error else ""


def show_tables(out: Path, console: Console) -> list[Table]:
    """Print the tables, and write the report if its packages are installed. Returns the tables."""
    from raybilevel import report
    from raybilevel.report._page import sections_of
    from raybilevel.report._sources import read_folder

    source = read_folder(out)
    for line in source.wrong:
        console.print(f"skipped: {line}", highlight=False, soft_wrap=True, markup=False)
    tables = [table for section in sections_of(source) for table in section.tables]
    for table in tables:
        print_table(table, console)
    try:
        console.print(str(report.write(out)), highlight=False, soft_wrap=True, markup=False)
    except ConfigError as error:
        console.print(f"no report: {error}", highlight=False, soft_wrap=True, markup=False)
    return tables


def print_table(table: Table, console: Console) -> None:
    """Print a table with aligned columns, the best cells in bold."""
    shown = rich.table.Table(title=table.title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for number, header in enumerate(table.headers):
        shown.add_column(header, justify="right" if number else "left", overflow="fold")
    for row in table.rows:
        shown.add_row(*(Text(cell.replace("**", ""), style="bold" if "**" in cell else "") for cell in row))
    console.print(shown, highlight=False)
    if table.note:
        console.print(table.note, highlight=False, markup=False)
    console.print()
