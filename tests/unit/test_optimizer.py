from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import pytest
import torch

from raybilevel.errors import ConfigError, SpaceError
from raybilevel.methods import Default, Paper
from raybilevel.methods._base import UpperResult, UpperStep
from raybilevel.search._optimizer import BilevelOptimizer, Observation
from raybilevel.search_state import Proposal, StepRecord
from raybilevel.space import Parameter, Space
from tests.problems_for_tests import Ridge

SPACE = Space((Parameter(("decay", "a"), 1e-3, 10.0, log=True), Parameter(("b",), 0.0, 1.0, step=0.25)))
GOOD = Observation(upper_loss=0.5, lower_loss=0.4, lower_gradient=(0.1, -0.2), passes=12.0)


def optimizer(slots: int = 1, **settings: object) -> BilevelOptimizer:
    return BilevelOptimizer(SPACE, Default(start_points=5), seed=3, slots=slots, **settings)


def told(search: BilevelOptimizer, *observations: Observation | None) -> BilevelOptimizer:
    """Ask for one training after another and tell these results."""
    for observation in observations:
        trial = str(len(search.state.trainings))
        assert search.ask(trial) is not None
        search.tell(trial, observation)
    return search


def result(step: UpperStep, *unit: float) -> UpperResult:
    return UpperResult(
        StepRecord(step.number, step.centre, passes=2.0), Proposal(unit or (0.3, 0.3), step.origin, step.region)
    )


def status(search: BilevelOptimizer, index: int) -> str:
    return search.state.trainings[index].status


# Asking.


def test_the_start_design_is_asked_first():
    search = optimizer()
    asked = [search.ask(str(i)) for i in range(5)]
    assert asked[0] == {"decay": {"a": pytest.approx(0.1)}, "b": 0.5}  # the centre
    assert search.ask("5") is None
    assert len({repr(config) for config in asked}) == 5


def test_a_trial_is_asked_once():
    search = optimizer()
    assert search.ask("x") == search.ask("x")
    assert len(search.state.trainings) == 1
    assert search.ask("x") == search.config("x")


def test_points_of_the_user_come_before_the_design():
    search = optimizer(points=[{"decay": {"a": 1.0}, "b": 0.75}])
    assert search.ask("x") == {"decay": {"a": pytest.approx(1.0)}, "b": 0.75}
    assert [p.origin for p in search.queue] == ["start"] * 5
    assert search.state.trainings[0].proposal.origin == "given"


def test_a_point_of_the_user_that_lacks_something_is_refused():
    with pytest.raises(SpaceError, match="b: missing"):
        optimizer(points=[{"decay": {"a": 1.0}}])


def test_the_point_that_is_kept_is_the_one_that_is_trained():
    search = optimizer(points=[{"decay": {"a": 1.0}, "b": 0.6}])
    config = search.ask("x")
    assert config is not None and config["b"] == 0.5  # 0.6 is no multiple of 0.25
    assert search.state.trainings[0].unit[1] == 0.5


@pytest.mark.parametrize("slots", [0, -1])
def test_no_slots_are_refused(slots: int):
    with pytest.raises(ConfigError, match="at least one slot"):
        optimizer(slots=slots)


# Telling.


def test_a_complete_result():
    search = told(optimizer(), GOOD)
    training = search.state.trainings[0]
    assert (training.status, training.finished) == ("done", 0)
    assert (training.lower_loss, training.upper_loss, training.lower_gradient, training.passes) == (
        0.4,
        0.5,
        (0.1, -0.2),
        12.0,
    )


def test_a_training_that_was_stopped_has_an_f_only():
    search = told(optimizer(), Observation(upper_loss=0.5, passes=3.0, complete=False))
    assert status(search, 0) == "stopped"
    assert search.state.best is None


@pytest.mark.parametrize(
    "observation",
    [
        None,
        Observation(math.nan, 0.4, (0.1, 0.2)),
        Observation(math.inf, 0.4, (0.1, 0.2)),
        Observation(0.5, math.nan, (0.1, 0.2)),
        Observation(math.nan, complete=False),
    ],
)
def test_what_counts_as_a_failure(observation: Observation | None):
    search = told(optimizer(), observation)
    assert status(search, 0) == "failed"
    assert not math.isfinite(search.state.trainings[0].upper_loss)


@pytest.mark.parametrize("entry", [math.inf, -math.inf, math.nan])
def test_a_gradient_that_is_not_finite_is_not_known_and_the_training_counts(entry: float):
    search = told(optimizer(), Observation(0.5, 0.4, (0.1, entry)))
    assert status(search, 0) == "done"
    known, unknown = search.state.trainings[0].lower_gradient
    assert known == 0.1 and math.isnan(unknown)


def test_results_are_numbered_as_they_come():
    search = optimizer(slots=3)
    for trial in "abc":
        search.ask(trial)
    for trial in "cab":
        search.tell(trial, GOOD)
    assert [t.index for t in search.state.told] == [2, 0, 1]


@pytest.mark.parametrize("repeated", [GOOD, None, Observation(9.0, 9.0, (9.0, 9.0))])
def test_repeated_results_are_ignored(repeated: Observation | None):
    search = told(optimizer(), GOOD)
    before = search.state
    search.tell("0", repeated)
    assert search.state == before


def test_results_of_unknown_trials_are_ignored():
    search = optimizer()
    search.tell("nobody", GOOD)
    assert search.state.trainings == ()


def test_a_training_from_elsewhere_informs_the_search():
    search = optimizer()
    search.add("old", {"decay": {"a": 1.0}, "b": 0.25}, Observation(0.1, complete=False))
    assert search.state.trainings[0].proposal.origin == "evaluated"
    assert status(search, 0) == "stopped"
    before = search.state
    search.add("old", {"decay": {"a": 1.0}, "b": 0.25}, GOOD)
    assert search.state == before


# Upper-level steps.


def test_a_step_is_planned_when_something_is_done_and_a_slot_is_free():
    search = told(optimizer(slots=2), *[GOOD] * 4)
    assert search.plan() is None  # the design has a point left
    search.ask("4")
    first = search.plan()
    assert first is not None and search.running == {0: first}
    assert search.plan() is None  # one training, one step
    search.tell("4", GOOD)
    second = search.plan()
    assert second is not None and second.number == 1


def test_a_steps_proposal_is_asked_next():
    search = told(optimizer(), *[GOOD] * 5)
    step = search.plan()
    assert step is not None
    search.tell_step(step.number, result(step, 0.5, 0.5))
    assert search.running == {}
    assert search.plan() is None  # the slot is the proposal's
    assert search.ask("next") == {"decay": {"a": pytest.approx(0.1)}, "b": 0.5}
    assert search.plan() is None
    assert search.state.trainings[5].proposal.region == step.region


def test_what_a_step_found_is_kept():
    search = told(optimizer(), *[GOOD] * 5)
    step = search.plan()
    assert step is not None
    found = UpperResult(StepRecord(step.number, 0, 2.0), None, {0: (1.0, 2.0)}, memory=b"later")
    search.tell_step(step.number, found)
    assert search.state.trainings[0].hypergradient == (1.0, 2.0)
    assert search.memory == b"later"
    assert search.state.steps == (StepRecord(0, 0, 2.0, finished=5),)
    assert not search.queue


def test_a_failed_step_is_replaced_by_a_space_filling_point():
    search = told(optimizer(), *[GOOD] * 5)
    step = search.plan()
    assert step is not None
    search.tell_step(step.number, None)
    assert search.state.steps[0].failed
    (proposal,) = search.queue
    assert proposal.origin == "fill" and all(0 <= u <= 1 for u in proposal.unit)


def test_a_step_is_heard_once_and_unknown_ones_are_ignored():
    search = told(optimizer(), *[GOOD] * 5)
    step = search.plan()
    assert step is not None
    search.tell_step(99, result(step))
    search.tell_step(step.number, result(step))
    before = search.state, list(search.queue)
    search.tell_step(step.number, result(step))
    search.tell_step(step.number, None)
    assert (search.state, list(search.queue)) == before


def test_a_copy_plans_the_steps_under_way_again():
    search = told(optimizer(), *[GOOD] * 5)
    step = search.plan()
    copied = search.without_running()
    assert copied.plan() == step
    copied.ask("other")
    assert search.running == {0: step} and "other" not in search.trials


# Faults.


def test_a_design_that_fails_altogether_goes_on_with_other_points():
    search = told(optimizer(), *[None] * 5)
    asked = [repr(search.config_of(t)) for t in search.state.trainings]
    for i in range(5, 8):
        config = search.ask(str(i))
        assert repr(config) not in asked
        asked.append(repr(config))
        assert search.ask("too many") is None  # one at a time
        search.tell(str(i), None)


@pytest.mark.parametrize("failed", [set(c) for n in range(6) for c in combinations(range(5), n)])
def test_failed_startup_trials_do_not_starve_the_search(failed: set[int]):
    search = told(optimizer(), *[None if i in failed else GOOD for i in range(5)])
    assert search.plan() is not None or search.ask("next") is not None


def test_a_lost_trials_point_is_asked_again():
    search = optimizer()
    lost = search.ask("a")
    search.lose("a")
    assert search.state.pending == ()
    assert search.ask("b") == lost
    search.tell("b", GOOD)
    assert [t.status for t in search.state.trainings] == ["lost", "done"]


def test_a_late_result_of_a_lost_trial_counts():
    search = optimizer()
    search.ask("a")
    search.lose("a")
    search.tell("a", GOOD)
    assert status(search, 0) == "done"
    assert not search.state.pending


def test_what_has_ended_cannot_be_lost():
    search = told(optimizer(), GOOD)
    queued = list(search.queue)
    search.lose("0")
    assert list(search.queue) == queued and not search.state.pending


@pytest.mark.parametrize("method", [Default(), Paper()])
def test_lost_startup_trials_do_not_starve_the_search(method: Default | Paper):
    search = BilevelOptimizer(SPACE, method)
    design = len(search.queue)
    for i in range(design):
        search.ask(f"first {i}")
    for i in range(design):
        search.lose(f"first {i}")
    for i in range(design):
        search.ask(f"second {i}")
        search.tell(f"second {i}", GOOD)
    assert search.plan() is not None


def test_exhausted_when_the_method_is_and_nothing_is_under_way():
    search = BilevelOptimizer(SPACE, Paper(iterations=1), slots=1)
    for i in range(25):
        search.ask(str(i))
        search.tell(str(i), GOOD)
    step = search.plan()
    assert step is not None and not search.exhausted
    search.tell_step(step.number, result(step))
    assert not search.exhausted
    search.ask("last")
    assert not search.exhausted
    search.tell("last", GOOD)
    assert search.exhausted
    assert search.plan() is None and search.ask("more") is None


def test_equal_searches_ask_equally_whatever_the_global_seed():
    configs = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        search = optimizer(slots=8)
        configs.append([search.ask(str(i)) for i in range(8)])
    assert configs[0] == configs[1]


# Coming back from another moment.


def test_a_failed_training_may_succeed_later_and_only_once():
    search = told(optimizer(), None, GOOD)
    assert status(search, 0) == "failed"
    search.tell("0", GOOD)
    search.tell("0", Observation(9.0, 9.0, (0.0, 0.0)))
    assert [t.upper_loss for t in search.state.told] == [0.5, 0.5]
    assert [t.finished for t in search.state.told] == [0, 1]


def test_an_adopted_trial_takes_its_proposal_from_the_queue():
    search, other = optimizer(), optimizer()
    for trial in "ab":
        search.ask(trial)
        other.adopt(trial, search.config(trial))
    assert other.state == search.state
    assert other.queue == search.queue
    other.adopt("a", search.config("b"))  # known already
    other.adopt("c", {"decay": {"a": 0.123}, "b": 0.25})
    assert [t.proposal.origin for t in other.state.trainings] == ["start", "start", "unknown"]
    assert other.config("c") == {"decay": {"a": pytest.approx(0.123)}, "b": 0.25}


def test_forgotten_trials_are_asked_again_in_order():
    search, never = told(optimizer(), GOOD), told(optimizer(), GOOD)
    for trial in "abc":
        search.ask(trial)
    search.forget(["b", "a", "c"])
    assert search.state == never.state
    assert list(search.trials) == ["0"]
    assert [search.ask(trial) for trial in "abc"] == [never.ask(trial) for trial in "abc"]
    assert search.state == never.state


def test_a_forgotten_trial_in_the_middle_is_lost_and_asked_again():
    search = optimizer()
    for trial in "ab":
        search.ask(trial)
    search.tell("b", GOOD)
    asked = search.config("a")
    search.forget(["a", "b"])  # b has ended and stays
    assert [t.status for t in search.state.trainings] == ["lost", "done"]
    assert search.ask("c") == asked


# Before there is enough for a step.


def test_slots_may_be_free_while_there_is_too_little_for_a_step():
    search = optimizer(slots=6)
    for trial in "abcdef":
        search.ask(trial)
    assert not search.has_too_little_for_a_step  # no slot is free
    search.tell("a", None)
    assert not search.has_too_little_for_a_step  # nothing is known
    search.tell("b", GOOD)
    assert search.plan() is None and search.has_too_little_for_a_step
    search.fill()
    assert not search.has_too_little_for_a_step  # something waits to be trained
    assert search.ask("g") is not None
    assert search.state.trainings[-1].proposal.origin == "fill"
    assert search.has_too_little_for_a_step  # the slot of the one that failed
    for trial in "cdef":
        search.tell(trial, GOOD)
    assert not search.has_too_little_for_a_step  # the start design is done
    assert search.plan() is not None


def test_points_that_fill_the_box_differ():
    search = optimizer(slots=6)
    for trial in "abcdef":
        search.ask(trial)
    for trial in "ghi":
        search.fill()
        assert search.ask(trial) is not None
    assert len({training.unit for training in search.state.trainings}) == 9


def test_while_every_training_is_stopped_all_slots_are_filled():
    search = optimizer(slots=3)
    count = len(search.queue)
    for number in range(count):
        assert search.ask(f"design {number}") is not None
    for number in range(count):
        search.tell(f"design {number}", Observation(1.0, passes=1.0, complete=False))
    assert [search.ask_if_free(f"more {number}") is not None for number in range(4)] == [True, True, True, False]
    assert {t.proposal.origin for t in search.state.pending} == {"fill"}


def test_trainings_that_were_all_stopped_are_planned_from_by_their_values():
    space = Space((Parameter(("decay",), 0.0, 1.0),))
    search = BilevelOptimizer(space, Default(), seed=0)

    def end(trial: str) -> None:
        config = search.ask(trial)
        assert config is not None
        search.tell(trial, Observation((config["decay"] - 0.37) ** 2, passes=3.0, complete=False))

    for number in range(8):
        assert search.plan() is None
        end(str(number))
    for number in range(8, 12):
        step = search.plan()
        assert step is not None and not step.targets and search.ask(str(number)) is None
        search.tell_step(step.number, search.run(Ridge(1), {}, step, no_checkpoint))
        end(str(number))
    assert {t.proposal.origin for t in search.state.trainings[8:]} >= {"region"}
    best = search.method.incumbent(search.state)
    assert best is not None and best.unit[0] == pytest.approx(0.37, abs=0.02)
    assert search.state.best is None


def no_checkpoint(index: int) -> dict[str, Any]:
    raise AssertionError(f"training {index} has no trained weights")
