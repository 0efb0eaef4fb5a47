from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from raybilevel._command.progress import LiveView, PlainView, Shown, View, duration, make_view
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


def shown(**changes: Any) -> Shown:
    return replace(Shown("title", 4), **changes)


def plain(view: View, *states: SearchState) -> None:
    for one in states:
        view.update(one, 0)
    view.close()


def test_plain_lines_one_for_each_training_and_no_escape_codes() -> None:
    out = io.StringIO()
    view = make_view(shown(verbose=True), Console(file=out, width=60))
    assert isinstance(view, PlainView)
    plain(view, state(2), state(2))  # the second has nothing new
    lines = out.getvalue().splitlines()
    assert lines[0] == "title"
    assert [line[:5] for line in lines[1:]] == ["[1/4]", "[2/4]", "[3/4]"]
    assert "training 2  F 0.5000  lowest 0.5000 (training 2)" in lines[2]
    assert "multiplier 12.5  violation 0.25" in lines[3]
    assert "training 3  failed" in lines[3]
    assert "\x1b" not in out.getvalue()


def test_trainings_that_break_a_constraint_are_marked_and_not_the_best_if_another_keeps_it() -> None:
    out = io.StringIO()
    broken = state(2).change(1, excesses=(0.1,))
    one, both = broken.change(0, excesses=(-0.1,)), broken.change(0, excesses=(0.2,))
    for found in (one, both):
        plain(make_view(shown(), Console(file=out, width=100)), found)
    lines = out.getvalue().splitlines()
    assert "training 2  F 0.5000, not feasible  lowest 1.0000 (training 1)" in lines[2]
    assert "training 2  F 0.5000, not feasible  lowest 0.5000 (training 2, not feasible)" in lines[6]
    assert Shown("title", 4).best(one) == "F 1 at training 1"
    assert Shown("title", 4).best(both).startswith("F 0.5 at training 2, not feasible, 0.5 (50%) below training 1")


def test_the_inside_of_the_method_is_for_those_who_ask() -> None:
    out = io.StringIO()
    plain(make_view(shown(), Console(file=out)), state(2))
    assert "multiplier" not in out.getvalue() and "start" not in out.getvalue()
    assert "multiplier" not in rendered(shown(), state(2))
    assert "12.5" in rendered(shown(verbose=True), state(2))


def test_a_resumed_run_says_what_it_knows_in_one_line() -> None:
    out = io.StringIO()
    plain(make_view(shown(resumed=True), Console(file=out)), state(2), state(3))
    lines = out.getvalue().splitlines()
    assert lines[1] == "going on after 3 trainings; lowest: F 0.5 at training 2, 0.5 (50%) below training 1"
    assert [line[:5] for line in lines[2:]] == ["[4/4]"]


def rendered(what: Shown, of: SearchState, width: int = 80) -> str:
    live = LiveView(what, Console(file=io.StringIO(), force_terminal=True))
    text = Console(width=width, file=io.StringIO(), record=True)
    text.print(live.render(of, 1))
    live.close()
    return text.export_text()


def test_the_live_table_shows_the_state_at_its_close() -> None:
    out = io.StringIO()
    view = make_view(shown(), Console(file=out, force_terminal=True, width=80))
    assert isinstance(view, LiveView)
    view.update(state(1), 1)
    view.update(state(2), 0)  # too soon after the last to be drawn
    view.close()
    text = rendered(shown(), state(2))
    assert "2 done, 0 running, 1 failed, of 4" in text
    assert "F 0.5 at training 2, 0.5 (50%) below training 1" in text
    assert "F 0.5 at training 2" in out.getvalue()


@pytest.mark.parametrize("width", [60, 100])
def test_sixteen_hyperparameters_fit(width: int) -> None:
    def config_of(training: Training) -> dict[str, Any]:
        moved = {"layer3", "layer7", "layer8", "layer11", "layer15"} if training.index else set()
        decay = {f"layer{i}": 0.01234567 if f"layer{i}" in moved else 1.0 for i in range(15)}
        return {"weight_decay": decay | ({"layer15": 0.5} if training.index else {"layer15": 1.0}), "kind": "relu"}

    text = rendered(shown(config_of=config_of), state(2), width)
    assert max(map(len, text.splitlines())) <= width
    words = " ".join(text.split())
    assert "weight_decay: layer3=0.01235, layer7=0.01235" in words and "layer15=0.5 and" in words
    assert "layer4" not in words
    assert "and 12 more" in words


def test_durations() -> None:
    assert [duration(s) for s in (0.4, 61, 3723)] == ["0 s", "1 min 01 s", "1 h 02 min"]
