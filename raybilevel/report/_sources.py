"""Reads a folder: the records of a comparison or of the benchmark, or one run, which becomes a record."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from raybilevel._records import store as records
from raybilevel._records.names import RECORDS_FOLDER, TUNE_FOLDER, TUNE_STATE
from raybilevel._records.record import Record
from raybilevel._records.run_folder import is_run, read_run
from raybilevel.errors import DataError, RaybilevelError


@dataclass(frozen=True)
class Source:
    """Records, and the files that could not be read.

    kind:  "comparison" or "run".
    wrong: one line for each file that was skipped.
    """

    kind: str
    folder: Path
    records: list[Record]
    wrong: list[str]

    @property
    def good(self) -> list[Record]:
        """The records with a completed training."""
        return [r for r in self.records if r.status != "unavailable" and r.lowest is not None]

    @property
    def done(self) -> list[Record]:
        """The records for tables: those of complete runs, even without a completed training."""
        return [r for r in self.records if r.status == "done" or self.kind == "run"]


def read_folder(folder: Path) -> Source:
    """The records of a comparison, a benchmark, a run, or a Tune experiment that another program started.

    Raises:
        DataError: the folder is of none of them.
    """
    if (folder / RECORDS_FOLDER).is_dir():
        found, wrong = records.read_all(folder)
        if not found:
            raise DataError(f"{folder}: no whole record in it" + (f"; {wrong[0]}" if wrong else ""))
        return Source("comparison", folder, found, wrong)
    if is_run(folder):
        return Source("run", folder, [read_run(folder)], [])
    if any(folder.glob(TUNE_STATE)):
        from raybilevel._records.experiment import read_experiment  # imports botorch, which takes seconds

        return Source("run", folder, [read_experiment(folder)], [])
    raise DataError(
        f"{folder}: neither the folder of a comparison ({RECORDS_FOLDER}/) nor of a run ({TUNE_FOLDER}/) nor of a Tune "
        f"experiment ({TUNE_STATE})"
    )


def check(source: Source) -> None:
    """Check that there is something to report.

    Raises:
        RaybilevelError: no training has been completed yet.
    """
    if not source.good:
        raise RaybilevelError(f"{source.folder}: no training ran to its end yet, so there is nothing to report")
