"""Which trials are taken for lost, with a clock of the test."""

from __future__ import annotations

import pytest

from raybilevel.methods import Default
from raybilevel.search import BilevelOptimizer
from raybilevel.tune._lost_trials import IDLE_POLLS, LostTrials
from tests.clock import Clock
from tests.problems_for_tests import unit_box


def asked(count: int, slots: int = 4) -> BilevelOptimizer:
    """A search with so many trials under way: 0, 1, ..."""
    search = BilevelOptimizer(unit_box(2), Default(start_points=12), slots=slots)
    for number in range(count):
        assert search.ask(str(number)) is not None
    return search


@pytest.fixture
def clock() -> Clock:
    return Clock()


def poll(lost: LostTrials, clock: Clock, times: int, seconds: float, idle: bool | None = None) -> None:
    """Tune asks in vain, after so many seconds each time."""
    for _ in range(times):
        clock.now += seconds
        lost.asked(idle)
        lost.answered(with_trial=False)


def test_all_are_lost_where_tune_has_had_nothing_to_run_for_a_minute(clock: Clock) -> None:
    search, lost = asked(3), LostTrials(clock)
    poll(lost, clock, IDLE_POLLS, 1.0)
    assert lost.find(search) == []
    poll(lost, clock, 1, 1.0)
    assert lost.find(search) == ["0", "1", "2"]


@pytest.mark.parametrize(("seconds", "idle"), [(0.1, None), (1.0, False)])
def test_none_is_lost_where_tune_has_something_to_run(seconds: float, idle: bool | None, clock: Clock) -> None:
    search, lost = asked(3), LostTrials(clock)
    poll(lost, clock, 1000, seconds, idle)
    assert lost.find(search) == []


@pytest.mark.parametrize("word", ["a result", "a trial that is given"])
def test_a_word_of_any_trial_ends_the_wait(word: str, clock: Clock) -> None:
    search, lost = asked(3), LostTrials(clock)
    poll(lost, clock, IDLE_POLLS, 1.0)
    if word == "a result":
        lost.heard_of("1")
    else:
        lost.answered(with_trial=True)
    poll(lost, clock, IDLE_POLLS, 1.0)
    assert lost.find(search) == []


def test_of_restored_trials_the_silent_ones_are_lost_after_two_rounds_of_the_slots(clock: Clock) -> None:
    search, lost = asked(12, slots=2), LostTrials(clock)
    lost.restored(["0", "1", "2"], told=0)
    lost.heard_of("1")
    for number in range(3, 3 + 3 + 2 * 2):  # as many as were restored, and two for each slot
        search.tell(str(number), None)
    assert lost.find(search) == []
    search.tell("10", None)
    assert lost.find(search) == ["0", "2"]
    assert lost.find(search) == []  # said once
