from __future__ import annotations

import math
import pickle
from dataclasses import replace

import pytest

from raybilevel.search_state import Proposal, SearchState, StepRecord, Training


def state(*statuses: str, finished: tuple[int, ...] = (), passes: tuple[float, ...] = ()) -> SearchState:
    """Trainings of these statuses with F = 10, 9, 8, ...; told in the order `finished`."""
    trainings = []
    for i, status in enumerate(statuses):
        order = (finished[i] if finished else i) if status not in ("pending", "lost") else -1
        cost = passes[i] if passes else 10.0
        trainings.append(Training(i, Proposal((0.1 * i,), "start"), status, order, upper_loss=10.0 - i, passes=cost))
    return SearchState(tuple(trainings))


def indices(trainings: tuple[Training, ...]) -> list[int]:
    return [t.index for t in trainings]


def test_a_state_travels_as_it_is():
    found = state("done", "pending", "stopped", "done")
    found = found.change(0, hypergradient=(0.1, 0.2), lower_gradient=(1.0, 2.0), lower_loss=0.5)
    found = found.change(3, lower_loss=0.25).change(1, lower_loss=0.0).change(2, lower_loss=0.0)
    found = replace(found, steps=(StepRecord(0, 0, 3.0, multiplier=2.0),))
    assert found.done and found.told  # worked out, and not to be sent
    copied = pickle.loads(pickle.dumps(found))
    assert copied == found and hash(copied.trainings[0]) == hash(found.trainings[0])
    assert set(vars(copied)) == {"trainings", "steps"}
    again = found.change(3, lower_loss=0.125)
    assert again.trainings[0].pickled is found.trainings[0].pickled  # not worked out twice
    assert pickle.loads(pickle.dumps(again)).trainings[3].lower_loss == 0.125
    assert "pickled" not in vars(copied.trainings[0]) and copied.steps[0].pickled == found.steps[0].pickled


def test_who_is_what():
    found = state("done", "pending", "failed", "stopped", "done", "lost")
    assert indices(found.told) == [0, 2, 3, 4]
    assert indices(found.done) == [0, 4]
    assert indices(found.measured) == [0, 3, 4]
    assert indices(found.pending) == [1]


def test_told_is_in_the_order_of_results():
    assert indices(state("done", "failed", "done", finished=(2, 0, 1)).told) == [1, 2, 0]


def test_the_best_is_the_lowest_of_the_complete_trainings():
    best = state("done", "done", "stopped", "failed", "pending").best
    assert best is not None and best.index == 1
    assert state("stopped", "failed").best is None


def test_passes_per_training_are_those_of_complete_ones():
    assert state("done", "done", "stopped", passes=(10.0, 20.0, 3.0)).passes_per_training == 15.0
    assert state("failed").passes_per_training == 1.0


def test_costs_by_hand():
    # complete 1 each, stopped 5 / 10, failed 1, pending nothing
    told = state(
        "done", "stopped", "failed", "pending", "done", passes=(10.0, 5.0, 0.0, 0.0, 10.0), finished=(0, 1, 2, -1, 3)
    )
    assert told.costs() == [1.0, 1.5, 2.5, 3.5]
    assert told.cost == 3.5


@pytest.mark.parametrize(
    ("finished", "expected"),
    [(0, [2.0, 3.0]), (1, [1.0, 3.0]), (2, [1.0, 3.0]), (99, [1.0, 3.0])],
)
def test_a_step_is_charged_to_the_training_that_ends_next(finished: int, expected: list[float]):
    told = state("done", "done")
    charged = SearchState(told.trainings, (StepRecord(0, 0, passes=10.0, finished=finished),))
    assert charged.costs() == expected


def test_nothing_costs_nothing():
    assert SearchState().cost == 0.0
    assert state("pending").cost == 0.0


def test_states_are_values():
    before = state("pending")
    after = before.change(0, status="done", upper_loss=1.0).add(Proposal((0.7,), "region", 0))
    assert before == before and indices(before.pending) == [0] and len(before.trainings) == 1
    assert after.trainings[0].upper_loss == 1.0 and after.trainings[1].index == 1
    assert after.trainings[1].unit == (0.7,) and math.isnan(after.trainings[1].upper_loss)
