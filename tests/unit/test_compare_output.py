"""What a comparison prints."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from raybilevel._compare.command import print_table
from raybilevel.report._tables import Table

TABLE = Table(
    "losses", "F at cost 20", ("method", "digits", "ridge"),
    (("raybilevel", "**0.2501**", "1.5"), ("random", "0.31", "**0.9**")), "Mean of three seeds.",
)  # fmt: skip


@pytest.mark.parametrize("width", [60, 100])
def test_tables_are_aligned_and_no_markdown(width: int) -> None:
    out = io.StringIO()
    print_table(TABLE, Console(file=out, width=width))
    text = out.getvalue()
    assert "|" not in text and "*" not in text
    lines = [line.rstrip() for line in text.splitlines() if "ra" in line]
    assert [line.split() for line in lines] == [["raybilevel", "0.2501", "1.5"], ["random", "0.31", "0.9"]]
    assert len({line.index(" ", line.index("0.") if "0.2501" in line else line.index("0.31")) for line in lines}) == 1
    assert text.startswith("F at cost 20") and "Mean of three seeds." in text
