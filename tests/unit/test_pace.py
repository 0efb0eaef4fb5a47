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


def test_no_wait_without_a_step_under_way(clock: Clock):
    pace = searching(clock, 1.0, 0.5)
    pace.step_ended(1)
    assert pace.patience(2) == 0


def test_no_wait_before_a_training_has_ended(clock: Clock):
    pace = Pace(clock)
    pace.step_begun(0)
    assert pace.patience(2) == 0


def test_the_wait_for_a_quick_step_is_at_most_a_workers_start(clock: Clock):
    pace = searching(clock, 1.0, 5.0, 0.3)
    assert pace.patience(2) == WORKER_START_S
    clock.now += 1.5
    assert pace.patience(2) == WORKER_START_S - 1.5
    pace.step_begun(9)
    assert pace.patience(2) == WORKER_START_S - 1.5  # the oldest step counts
    clock.now += WORKER_START_S
    assert pace.patience(2) == 0


def test_the_first_step_is_given_a_workers_start_more(clock: Clock):
    assert searching(clock, 1.0).patience(2) == 2 * WORKER_START_S
    assert searching(clock, 1.0, 9.0).patience(2) == WORKER_START_S  # its time does not count
    assert searching(clock, 1.0, 9.0, 9.0).patience(2) == 0


def test_no_wait_for_a_first_step_with_long_trainings(clock: Clock):
    assert searching(clock, 11.0).patience(2) > 0
    assert searching(clock, 13.0).patience(2) == 0
    assert searching(clock, 13.0, 9.0, 0.5).patience(2) > 0  # later steps are known to be quick


def test_no_wait_for_slow_steps(clock: Clock):
    assert searching(clock, 1.0, 5.0, 1.5, 1.5, 0.1).patience(2) > 0
    assert searching(clock, 1.0, 5.0, 2.5, 2.5, 0.1).patience(2) == 0


@pytest.mark.parametrize(("slots", "reports", "waits"), [(16, 1, True), (16, 300, False), (8, 300, True)])
def test_no_wait_that_delays_frequent_reports(clock: Clock, slots: int, reports: int, waits: bool):
    """A step of half a second delays the next report of each other training by up to as much."""
    assert (searching(clock, 60.0, 5.0, 0.5, reports=reports).patience(slots) > 0) == waits


def test_no_wait_for_steps_that_cannot_keep_up_with_the_slots(clock: Clock):
    pace = searching(clock, 5.0, 5.0, 1.0)
    assert pace.patience(10) > 0  # ten steps take 10 s, and so do a step, a training and the start of a worker
    assert pace.patience(11) == 0


def test_medians_follow_the_newest_steps(clock: Clock):
    pace = searching(clock, 1.0, 5.0, *[3.0] * 9)
    assert pace.patience(2) == 0
    for number in range(10, 15):
        pace.step_ended(number)
        pace.step_begun(number + 1)
    assert pace.patience(2) > 0
