from __future__ import annotations

import io

from rich.console import Console

from raybilevel._command.progress import LiveView, PlainView, duration, make_view
from raybilevel.search_state import Proposal, SearchState, StepRecord, Training


def state(count: int) -> SearchState:
    trainings = tuple(
        Training(
            i,
            Proposal((0.5,), "start"),
            "done",
            i,
            lower_loss=1.0,
            upper_loss=1.0 / (i + 1),
            lower_gradient=(0.0,),
            passes=1.0,
        )
        for i in range(count)
    )
    failed = Training(count, Proposal((0.5,), "region"), "failed", count)
    return SearchState((*trainings, failed), (StepRecord(0, 0, 1.0, multiplier=12.5, violation=0.25),))


def test_plain_lines_one_for_each_training_and_no_escape_codes() -> None:
    out = io.StringIO()
    view = make_view("title", 4, Console(file=out, width=60))
    assert isinstance(view, PlainView)
    view.update(state(2), 0)
    view.update(state(2), 0)  # nothing new
    view.close()
    lines = out.getvalue().splitlines()
    assert lines[0] == "title"
    assert [line[:5] for line in lines[1:]] == ["[1/4]", "[2/4]", "[3/4]"]
    assert "F 0.5000  best 0.5000" in lines[2]
    assert "multiplier 12.5  violation 0.25" in lines[3]
    assert "failed" in lines[3]
    assert "\x1b" not in out.getvalue()


def test_the_live_table_shows_the_state_at_its_close() -> None:
    out = io.StringIO()
    view = make_view("title", 4, Console(file=out, force_terminal=True, width=80))
    assert isinstance(view, LiveView)
    view.update(state(1), 1)
    view.update(state(2), 0)  # too soon after the last to be drawn
    view.close()
    text = Console(width=80, file=io.StringIO(), record=True)
    text.print(view.render(*view.newest))
    shown = text.export_text()
    assert "2 done, 0 running, 1 failed, of 4" in shown
    assert "0.5  (training 1)" in shown
    assert "12.5" in shown
    assert "0.5  (training 1)" in out.getvalue()


def test_durations() -> None:
    assert [duration(s) for s in (0.4, 61, 3723)] == ["0 s", "1 min 01 s", "1 h 02 min"]
