from __future__ import annotations

import pytest

from raybilevel._cluster.pace import WORKER_START_S, Pace
from tests.clock import Clock


@pytest.fixture
def clock() -> Clock:
    return Clock()


def searching(clock: Clock, training: float, *steps: float, reports: int = 1) -> Pace:
    """After trainings and steps of these lengths, with a step that has just begun."""
    pace = Pace(clock)
    pace.trained(training, reports)
    for number, seconds in enumerate(steps):
        pace.step_begun(number)
        clock.now += seconds
        pace.step_ended(number)
    pace.step_begun(len(steps))
    return pace


def test_nothing_is_waited_for_where_nothing_is_under_way(clock: Clock):
    pace = searching(clock, 1.0, 0.5)
    pace.step_ended(1)
    assert pace.patience(2) == 0


def test_nothing_is_waited_for_before_a_training_has_ended(clock: Clock):
    pace = Pace(clock)
    pace.step_begun(0)
    assert pace.patience(2) == 0


def test_a_quick_step_is_waited_for_as_long_as_a_process_takes_to_start(clock: Clock):
    pace = searching(clock, 1.0, 5.0, 0.3)
    assert pace.patience(2) == WORKER_START_S
    clock.now += 1.5
    assert pace.patience(2) == WORKER_START_S - 1.5
    pace.step_begun(9)
    assert pace.patience(2) == WORKER_START_S - 1.5  # the oldest decides
    clock.now += WORKER_START_S
    assert pace.patience(2) == 0


def test_the_first_step_starts_a_process_itself(clock: Clock):
    assert searching(clock, 1.0).patience(2) == 2 * WORKER_START_S
    assert searching(clock, 1.0, 9.0).patience(2) == WORKER_START_S  # and says nothing of the others
    assert searching(clock, 1.0, 9.0, 9.0).patience(2) == 0


def test_a_first_step_is_not_waited_for_by_long_trainings(clock: Clock):
    assert searching(clock, 11.0).patience(2) > 0
    assert searching(clock, 13.0).patience(2) == 0
    assert searching(clock, 13.0, 9.0, 0.5).patience(2) > 0  # but the others are, once it is known that they are quick


def test_slow_steps_are_not_waited_for(clock: Clock):
    assert searching(clock, 1.0, 5.0, 1.5, 1.5, 0.1).patience(2) > 0
    assert searching(clock, 1.0, 5.0, 2.5, 2.5, 0.1).patience(2) == 0


@pytest.mark.parametrize(("slots", "reports", "waits"), [(16, 1, True), (16, 300, False), (8, 300, True)])
def test_trainings_that_report_often_are_not_held_up(clock: Clock, slots: int, reports: int, waits: bool):
    """A step of half a second holds up each other training's next report by as much, if they report that often."""
    assert (searching(clock, 60.0, 5.0, 0.5, reports=reports).patience(slots) > 0) == waits


def test_steps_that_could_not_keep_up_with_the_slots_are_not_waited_for(clock: Clock):
    pace = searching(clock, 5.0, 5.0, 1.0)
    assert pace.patience(10) > 0  # ten steps, or one, a training and the start of its process: 10 s
    assert pace.patience(11) == 0


def test_what_is_usual_follows_the_newest(clock: Clock):
    pace = searching(clock, 1.0, 5.0, *[3.0] * 9)
    assert pace.patience(2) == 0
    for number in range(10, 15):
        pace.step_ended(number)
        pace.step_begun(number + 1)
    assert pace.patience(2) > 0
