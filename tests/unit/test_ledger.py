"""What a run is charged, told by the events that Tune sends: real `Trial` objects, no cluster."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
from ray.tune.experiment import Trial

from raybilevel._compare.config import Budget
from raybilevel._compare.ledger import BudgetStopper, Ledger, searched
from raybilevel._config.space import read_space
from raybilevel.space import Parameter, Space

SPACE = Space((Parameter(("decay", "a"), 1e-2, 1.0, log=True),))
EPOCHS = 4


def ledger(steps: tuple[float, int] = (0.0, 0), **budget: float) -> Ledger:
    return Ledger(SPACE, EPOCHS, Budget(**(budget or {"trainings": 3})), steps=lambda: steps)


def trial(decay: float = 0.1) -> Any:
    return Trial("lower_level", config={"decay": {"a": decay}, "constant": 3}, stub=True)


def report(book: Ledger, who: Any, epoch: int, upper: float = 1.0) -> None:
    result = {
        "epoch": epoch, "upper_loss": upper, "lower_loss": 2.0, "test_loss": 0.5, "lower_passes": float(epoch),
        "lower_level_finished": epoch == EPOCHS, "time_this_iter_s": 0.1, "pid": 7, "node_ip": "here",
        "config": dict(who.config), "done": False, "training_iteration": epoch,
    }  # fmt: skip
    book.on_trial_result(0, [], who, result)


def train(book: Ledger, who: Any, upper: float, epochs: int = EPOCHS) -> None:
    book.on_trial_start(0, [], who)
    for epoch in range(1, epochs + 1):
        report(book, who, epoch, upper)
    book.on_trial_complete(0, [], who)


def test_every_epoch_is_charged_and_only_whole_trainings_are_results() -> None:
    book = ledger()
    train(book, trial(0.1), upper=2.0)
    train(book, trial(0.2), upper=0.1, epochs=2)  # lower, but no trained lower level
    train(book, trial(0.3), upper=1.5)
    found = book.observations()
    assert [o.status for o in found] == ["done", "stopped", "done"]
    assert [o.cost for o in found] == pytest.approx([1, 1.5, 2.5])
    assert [o.upper_loss for o in found] == [2.0, None, 1.5]
    assert found[1].stopped_upper_loss == 0.1
    assert [o.incumbent for o in found] == [0, 0, 2]
    assert found[0].metrics == {"test_loss": 0.5}
    assert found[0].hyperparameters == {"decay": {"a": 0.1}}
    assert found[0].unit == pytest.approx([0.5])


def test_epochs_between_two_reports_are_charged() -> None:
    book, who = ledger(), trial()
    book.on_trial_start(0, [], who)
    for epoch in (2, 3, 3, EPOCHS):  # the third is a retry's
        report(book, who, epoch)
    assert book.epochs == 5
    assert book.observations()[0].cost == pytest.approx(1.25)


def test_upper_level_steps_are_charged_in_trainings() -> None:
    book = ledger(steps=(6.0, 1))
    train(book, trial(), upper=1.0)
    assert book.passes_per_training == EPOCHS
    assert book.spent() == pytest.approx(1 + 6 / EPOCHS)
    assert book.observations()[0].cost == pytest.approx(2.5)


def test_failures_are_charged_and_a_loss_that_is_not_finite_is_one() -> None:
    book = ledger()
    broken, diverged = trial(0.1), trial(0.2)
    book.on_trial_start(0, [], broken)
    report(book, broken, 1)
    book.on_trial_error(0, [], broken)
    train(book, diverged, upper=float("nan"))
    found = book.observations()
    assert [o.status for o in found] == ["failed", "failed"]
    assert [o.epochs for o in found] == [2, 6]  # the epoch in which it failed counts
    assert book.best is None


def test_nothing_counts_after_the_budget_is_spent() -> None:
    book = ledger(trainings=1)
    first, second = trial(0.1), trial(0.2)
    book.on_trial_start(0, [], second)
    report(book, second, 1)
    book.on_trial_start(0, [], first)
    for epoch in range(1, EPOCHS):
        report(book, first, epoch)
    assert book.over and BudgetStopper(book).stop_all()
    report(book, first, EPOCHS)
    book.on_trial_complete(0, [], first)
    assert book.epochs == EPOCHS and not book.observed
    assert book.trials[first.trial_id].status == "cut"


def test_room_counts_trainings_under_way() -> None:
    book = ledger(trainings=3)
    assert book.room()
    one, two = trial(0.1), trial(0.2)
    for who in (one, two):
        book.on_trial_start(0, [], who)
    assert book.room()
    three = trial(0.3)
    book.on_trial_start(0, [], three)
    assert not book.room()
    report(book, three, 1)
    book.on_trial_complete(0, [], three)  # stopped after one of four epochs: too little is left for another
    assert not book.room()


@pytest.mark.parametrize(("budget", "spent"), [({"epochs": 12}, 4), ({"trainings": 3}, 1)])
def test_the_unit_of_the_budget(budget: dict[str, float], spent: float) -> None:
    book = ledger(**budget)
    train(book, trial(), upper=1.0)
    assert book.spent() == pytest.approx(spent)
    assert book.observations()[0].spent == pytest.approx(spent)


def test_gpu_seconds_count_trials_and_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    from raybilevel._compare import ledger as module

    now = 100.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    book = Ledger(SPACE, EPOCHS, Budget(gpu_seconds=10), gpus=(0.5, 1.0), steps=lambda: (0.0, 1))
    running, waiting = trial(0.1), trial(0.2)
    running.set_status(Trial.RUNNING)
    now = 104.0
    book.on_step_end(0, [running, waiting])
    assert book.spent() == pytest.approx(4 * 0.5 + 4 * 1.0)
    assert not book.over
    now = 107.0
    book.on_step_end(0, [running, waiting])
    assert book.over


def test_an_interrupt_ends_the_run() -> None:
    book = ledger()
    book.interrupted = True
    assert BudgetStopper(book).stop_all()


def test_a_stopper_is_shared_by_copies_and_leaves_the_ledger_behind_when_pickled() -> None:
    stopper = BudgetStopper(ledger())
    assert copy.deepcopy({"stop": stopper})["stop"] is stopper
    assert "ledger" not in vars(pickle.loads(pickle.dumps(stopper)))


def test_a_population_member_that_copies_another_is_charged_for_its_own_epochs() -> None:
    # PBT sets a trial back to another's epoch, with its gradient evaluations: reports are what it ran.
    book = ledger(trainings=10)
    who = trial()
    book.on_trial_start(0, [], who)
    for epoch in (1, 2, 1, 2, 3, 4):
        report(book, who, epoch)
    assert book.observations()[0].epochs == 6
    assert book.cost(book.epochs, 0) == pytest.approx(1.5)


def test_lists_and_alternatives_are_recorded_whole() -> None:
    rate, beta = {"uniform": [0.0, 1.0]}, {"uniform": [0.5, 1.0]}
    optimizer = {"choice": [{"name": "sgd"}, {"name": "adam", "beta": beta}]}
    space, constants = read_space({"rates": [rate, 3, rate], "optimizer": optimizer, "epochs": 3})
    assert space is not None
    for had in ({"rates": [0.1, 3, 0.7], "optimizer": {"name": "sgd"}},
                {"rates": [0.3, 3, 0.9], "optimizer": {"name": "adam", "beta": 0.6}}):  # fmt: skip
        assert searched(space, {**had, **constants}) == had
