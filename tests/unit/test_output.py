"""The last lines of a run."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from raybilevel._command.output import show_result

WORDS = [
    "Found: F 0.4 at training 4, " + ", ".join(f"decay{i}=0.25" for i in range(9)) + ".",
    "Helped: yes.",
    "How sure: x.",
]


def printed(width: int = 100, **changes: Any) -> list[str]:
    summary = {"in_words": WORDS, "metrics": {"test_accuracy": 0.93, "test_loss": 0.2}, "failed_trainings": 0,
               "upper_steps": 11, "cost": 15.4, "trainings": 14, **changes}  # fmt: skip
    out = io.StringIO()
    show_result(Console(file=out, width=width), summary, Path("runs/one"))
    return out.getvalue().splitlines()


@pytest.mark.parametrize("width", [60, 100])
def test_a_run_ends_with_its_conclusion_and_then_what_it_left(width: int) -> None:
    lines = printed(width)
    end = lines.index("")
    assert " ".join(line.strip() for line in lines[:end]) == " ".join(WORDS)
    assert max(map(len, lines[:end])) <= width
    heads = [line.partition(": ")[0] for line in lines[end + 1 :]]
    assert heads == ["Metrics", "Cost", "Results", "Report", "More trainings"]  # each in one line, to be copied
    assert lines[end + 1 : end + 4] == [
        "Metrics: test_accuracy 0.93",
        "Cost: 15.4 trainings, for 14 trainings and 11 upper-level steps",
        "Results: runs/one",
    ]


def test_the_cost_names_trainings_that_failed_and_no_steps_that_there_were_not() -> None:
    assert "Cost: 15.4 trainings, for 14 trainings, 2 of which failed" in printed(failed_trainings=2, upper_steps=0)
