"""Tables as texts, for Markdown, CSV and the page."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Table:
    """A table of texts.

    note: an explanation for readers, printed below it.
    """

    name: str
    title: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    @property
    def plain_rows(self) -> list[list[str]]:
        """The rows without the marks of bold cells."""
        return [[cell.replace("**", "") for cell in row] for row in self.rows]


def markdown_table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def table_csv(table: Table) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(table.headers)
    # Bold is Markdown's, and no part of the value.
    writer.writerows(table.plain_rows)
    return out.getvalue()


def markdown(tables: Sequence[Table]) -> str:
    parts = []
    for table in tables:
        parts.append(f"## {table.title}\n\n{markdown_table(table.headers, table.rows)}")
        if table.note:
            parts.append(table.note)
    return "\n\n".join(parts) + "\n"


def write_tables(tables: Sequence[Table], observations: pd.DataFrame, folder: Path) -> None:
    """Write each table as CSV, all tables as Markdown, and the observations as CSV."""
    folder.mkdir(parents=True, exist_ok=True)
    for table in tables:
        (folder / f"{table.name}.csv").write_text(table_csv(table), encoding="utf-8")
    (folder / "tables.md").write_text(markdown(tables), encoding="utf-8")
    observations.to_csv(folder / "observations.csv", index=False)
