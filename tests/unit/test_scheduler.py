"""Which trial gets a process that is free."""

from __future__ import annotations

import pickle

import pytest
from ray.tune.experiment import Trial

from raybilevel.tune._scheduler import WORKER_START_S, PatientFIFO
from tests.clock import Clock


class Trials:
    """Those that a scheduler asks Tune's controller for."""

    def __init__(self) -> None:
        self.trials: list[Trial] = []
        self.looks_at_all = 0

    def add(self, status: str = Trial.PENDING) -> Trial:
        trial = Trial("none", stub=True)
        trial.status = status
        self.trials.append(trial)
        return trial

    def get_trials(self) -> list[Trial]:
        self.looks_at_all += 1
        return self.trials

    def get_live_trials(self) -> set[Trial]:
        return {trial for trial in self.trials if trial.status != Trial.TERMINATED}


@pytest.fixture
def trials() -> Trials:
    return Trials()


def test_the_newest_trial_has_the_free_process_and_those_for_which_one_starts_wait(trials: Trials) -> None:
    scheduler = PatientFIFO(clock=Clock())
    first = trials.add()
    assert scheduler.choose_trial_to_run(trials) is first
    assert scheduler.choose_trial_to_run(trials) is None  # its process is starting
    second = trials.add()
    assert scheduler.choose_trial_to_run(trials) is second
    assert scheduler.choose_trial_to_run(trials) is None
    second.status = Trial.RUNNING
    assert scheduler.choose_trial_to_run(trials) is None
    second.status = Trial.PENDING  # it failed and is tried again
    assert scheduler.choose_trial_to_run(trials) is second


def test_trials_that_wait_for_room_come_first_in_their_order(trials: Trials) -> None:
    clock = Clock()
    scheduler = PatientFIFO(clock=clock)
    first = trials.add()
    scheduler.choose_trial_to_run(trials)
    clock.now += 1
    trials.add()
    scheduler.choose_trial_to_run(trials)
    clock.now += WORKER_START_S - 1
    assert scheduler.choose_trial_to_run(trials) is None
    clock.now += 0.5
    assert scheduler.choose_trial_to_run(trials) is first
    new = trials.add()
    assert scheduler.choose_trial_to_run(trials) is new  # nothing starts for it yet
    assert scheduler.choose_trial_to_run(trials) is first


def test_without_pending_trials_it_is_first_in_first_out(trials: Trials) -> None:
    scheduler = PatientFIFO()
    assert scheduler.choose_trial_to_run(trials) is None
    trials.add(Trial.TERMINATED)
    trials.add(Trial.RUNNING)
    assert scheduler.choose_trial_to_run(trials) is None
    assert trials.looks_at_all == 0  # there may be thousands that are over
    paused = trials.add(Trial.PAUSED)
    trials.add(Trial.PAUSED)
    assert scheduler.choose_trial_to_run(trials) is paused


def test_what_is_saved_with_an_experiment_holds_no_times_of_this_process(trials: Trials) -> None:
    scheduler = PatientFIFO()
    trial = trials.add()
    assert scheduler.choose_trial_to_run(trials) is trial
    again = pickle.loads(pickle.dumps(scheduler))
    assert again.choose_trial_to_run(trials) is trial
