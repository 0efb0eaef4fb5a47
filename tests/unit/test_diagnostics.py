from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from raybilevel._models.constraints import judged
from raybilevel._records.summary import summary_of
from raybilevel.methods import make_method
from raybilevel.search._diagnostics import diagnose, verdict
from raybilevel.search._new_data import new_data
from raybilevel.search_state import Proposal, SearchState, Shrinkage, StepRecord, Training
from raybilevel.space import Parameter, Space


def training(index: int, x: float, upper: float, **others: object) -> Training:
    proposal = Proposal((x,), "region" if index else "start", 0 if index else None, predicted_upper_loss=upper + 0.01)
    done = Training(
        index, proposal, "done", index, lower_loss=2 * upper, upper_loss=upper, lower_gradient=(0.0,), passes=10.0
    )
    return replace(done, **others)  # type: ignore[arg-type]


def descent() -> SearchState:
    """F = x^2 followed by exact hypergradients 2 x from 0.9 in steps of 0.2."""
    points = [0.9, 0.7, 0.5, 0.3, 0.1]
    trainings = tuple(training(i, x, x * x, hypergradient=(2 * x,)) for i, x in enumerate(points))
    steps = tuple(StepRecord(i, i, passes=5.0, multiplier=float(i), violation=0.0, finished=i + 1) for i in range(4))
    return SearchState(trainings, steps)


def test_costs_charge_steps_where_they_ended() -> None:
    # Trainings cost 10 passes, steps 5; a step that ended after n trainings is paid with the next one.
    assert descent().costs() == pytest.approx([1, 2.5, 4, 5.5, 7])
    stopped = training(1, 0.5, 1.0, status="stopped", passes=2.5)
    failed = training(2, 0.5, math.nan, status="failed")
    assert SearchState((training(0, 0.9, 1.0), stopped, failed)).costs() == pytest.approx([1, 1.25, 2.25])


def test_exact_hypergradients_agree_with_trained_differences() -> None:
    found = diagnose(descent())
    assert found.hypergradient_steps == 4
    assert (found.hypergradient_direction, found.hypergradient_length) == (1.0, pytest.approx(1.0))
    short = tuple(replace(t, hypergradient=(-0.5 * t.unit[0],)) for t in descent().trainings)
    wrong = diagnose(SearchState(short))
    assert (wrong.hypergradient_direction, wrong.hypergradient_length) == (-1.0, pytest.approx(4.0))
    few = diagnose(SearchState(short[:3]))
    assert (few.hypergradient_steps, few.hypergradient_direction, few.hypergradient_length) == (2, None, None)


def test_one_overshoot_does_not_decide() -> None:
    found = diagnose(descent().change(4, upper_loss=17.0))
    assert found.hypergradient_direction == 0.5  # three of four
    assert found.hypergradient_length == pytest.approx(1.0)


def test_the_newest_descent_and_prediction_are_shown() -> None:
    trainings = descent().trainings
    last = replace(trainings[-1], proposal=replace(trainings[-1].proposal, predicted_value=0.05))
    found = diagnose(replace(descent(), trainings=(*trainings[:-1], last)))
    assert found.multiplier == 3.0
    assert found.value_error == pytest.approx(0.05 - 0.02, abs=1e-12)
    assert found.hypergradient_norm == pytest.approx(0.2)
    assert diagnose(SearchState()).multiplier is None


def test_verdicts() -> None:
    state = descent()
    falling = {i: t.upper_loss for i, t in enumerate(state.trainings)}
    rising = {i: 1 - t.upper_loss for i, t in enumerate(state.trainings)}
    assert verdict(SearchState(), False, {}) == "no result"
    assert verdict(state, True, falling) == "converged"
    assert verdict(state, False, falling) == "budget exhausted"
    assert verdict(state, True, rising) == "validation set overfitted"
    assert verdict(SearchState(missed(state, "region")), False, {}) == "surrogate too poor"
    assert verdict(SearchState(missed(state, "region")), True, {}) == "converged"
    assert verdict(SearchState(missed(state, "global")), False, {}) == "budget exhausted"


def missed(state: SearchState, origin: str) -> tuple[Training, ...]:
    """With five more trainings that were predicted badly."""
    region = 0 if origin == "region" else None
    far = (training(i, 0.5, 0.25, proposal=Proposal((0.5,), origin, region, 9.0)) for i in range(5, 10))
    return (*state.trainings, *far)


def test_a_refit_worse_than_an_earlier_incumbent_shows_overfitting() -> None:
    state = descent()
    falling = {i: t.upper_loss for i, t in enumerate(state.trainings)}
    assert verdict(state, True, falling, refit_loss=0.01) == "converged"
    assert verdict(state, True, falling, refit_loss=2.0) == "validation set overfitted"


@pytest.mark.parametrize("shift", [0.0, 1e3, -1.0])
@pytest.mark.parametrize("unit", [1.0, 1e-8])
def test_overfitting_depends_neither_on_a_shift_of_the_loss_nor_on_its_unit(shift: float, unit: float) -> None:
    state = descent()
    for t in state.trainings:
        state = state.change(t.index, upper_loss=unit * (t.upper_loss + shift))
    rising = {i: unit * (1 - t.upper_loss + shift) for i, t in enumerate(descent().trainings)}
    assert verdict(state, True, rising) == "validation set overfitted"
    # A rise that the scatter of F hides is none: the last step gained little.
    level = {i: unit * (0.001 * i + shift) for i in range(len(state.trainings))}
    assert verdict(state, True, level) == "converged"


def test_the_incumbent_is_not_the_luckiest_where_values_are_noisy() -> None:
    noisy = StepRecord(4, 0, 0.0, seen=4, expected=((2, 0.24), (3, 0.3)))
    state = replace(descent(), steps=(noisy,)).change(3, upper_loss=0.05)
    # The last one has ended since: the model predicted 0.5 and believes a tenth of what it sees.
    proposal = replace(state.trainings[4].proposal, predicted_upper_loss=0.5, gain=0.1)
    state = state.change(4, proposal=proposal)
    assert state.expected == {2: 0.24, 3: 0.3, 4: pytest.approx(0.5 + 0.1 * (0.01 - 0.5))}
    method = make_method("default")
    best = method.incumbent(state)
    assert best is not None and best.index == 2
    assert state.best is not None and state.best.index == 4
    assert diagnose(state).expected_upper_loss == state.expected[4]
    # Whatever a model expects of the worst, noise has not made it so.
    misled = replace(state, steps=(replace(noisy, expected=((0, 0.01), (2, 0.24))),))
    best = method.incumbent(misled)
    assert best is not None and best.index == 2
    # Nor what a strong penalty leaves, which tells only that one apart from the others.
    strong = Shrinkage(((0, 1, 2, 3),), "log_likelihood", 100, 1e3, (0.5,) * 4, 1.0, applied=True)
    held = replace(misled, steps=(replace(misled.steps[0], shrinkage=strong),))
    for t in state.trainings:
        held = held.change(t.index, proposal=replace(t.proposal, unit=(0.5, 0.5, 0.5, 0.1 if t.index else 0.5)))
    assert judged(held).best == judged(held).trainings[0]
    best = method.incumbent(held)
    assert best is not None and best.index == 2
    # Of those that it leaves, the model may not prefer what was seen above the median.
    worse = replace(held, steps=(replace(held.steps[0], expected=((1, 0.01), (2, 0.24))),))
    best = method.incumbent(worse)
    assert best is not None and best.index == 2
    sure = replace(state, steps=(replace(noisy, expected=((2, 0.25), (3, 0.09)), seen=4),))
    sure = sure.change(4, proposal=replace(proposal, gain=1.0))
    best = method.incumbent(sure)
    assert best is not None and best.index == 4


def test_the_summary_is_json_with_failures_in_its_history() -> None:
    failed = training(5, 0.2, math.nan, status="failed", lower_loss=math.nan)
    state = replace(descent(), trainings=(*descent().trainings, failed))
    space = Space((Parameter(("a",), 0.0, 10.0),))
    results = {4: {"test_loss": 0.5}}
    about = {"problem": "p", "method": "default", "seed": 0}
    summary = summary_of(state, space, make_method("default"), results, {4: "/there"}, about, 0.25, 1.0)
    again = json.loads(json.dumps(summary, allow_nan=False))
    assert again["best"] == {
        "training": 5, "hyperparameters": {"a": 1.0}, "lower_loss": pytest.approx(0.02),
        "upper_loss": pytest.approx(0.01), "expected_upper_loss": None,
        "test_loss": 0.5, "feasible": True, "test_loss_refit": 0.25, "checkpoint": "/there",
    }  # fmt: skip
    assert again["lowest"] == {key: again["best"][key] for key in again["lowest"]}
    assert again["lowest"].keys() == again["best"].keys() - {"lower_loss", "test_loss_refit"}
    assert again["start"]["training"] == again["history"][0]["training"] == 1
    assert again["start"]["upper_loss"] == again["history"][0]["upper_loss"]
    assert again["new_data"] is None
    assert again["trainings"] == 6
    assert again["failed_trainings"] == 1
    assert again["history"][-1]["upper_loss"] is None
    assert again["history"][-1]["best_upper_loss"] == pytest.approx(0.01)
    assert set(again["versions"]) >= {"python", "ray", "torch", "botorch", "gpytorch", "numpy", "raybilevel"}


def test_what_is_expected_of_new_data() -> None:
    trainings = tuple(
        Training(i, Proposal(unit, "start"), "done", i, upper_loss=upper, lower_loss=0.0)
        for i, (unit, upper) in enumerate((((0.5, 0.5, 0.2), 0.30), ((0.1, 0.9, 0.2), 0.21)))
    )
    shrinkage = Shrinkage(((0, 1),), "log_likelihood", 100, 2.0, (0.45, 0.55, 0.2), 2.125, applied=True)
    state = SearchState(trainings, (StepRecord(0, 0, 1.0, shrinkage=shrinkage),))
    found = new_data(state, make_method("default").incumbent(state))
    assert found is not None
    # 0.02125 by the number of hyperparameters; 2 (-0.05, 0.05) . (x - mode) from the mode: -0.01 and 0.07
    assert found.expected_loss == pytest.approx(0.30 + 0.02125 - 0.01)
    assert found.expected_loss_of_lowest == pytest.approx(0.21 + 0.02125 + 0.07)
    assert found.in_words == (
        "F 0.3, expected on new data about 0.31. 1 of 3 hyperparameters is not supported by 100 examples and follows "
        "the others of its group. The lowest F is 0.21, expected on new data about 0.3"
    )
    plain = replace(state.steps[0], shrinkage=replace(shrinkage, applied=False, supported=3.0))
    found = new_data(SearchState(trainings, (plain,)), trainings[1])
    assert found is not None and found.in_words == "F 0.21, expected on new data about 0.31"
    assert new_data(SearchState(trainings), trainings[0]) is None


def test_a_result_that_breaks_a_constraint_is_not_feasible() -> None:
    states = [SearchState((training(0, 0.9, 1.0, excesses=(excess,)),)) for excess in (0.5, -0.5)]
    assert [verdict(state, True, {}) for state in states] == ["not feasible", "converged"]


def test_trainings_that_break_a_constraint_do_not_tell_of_overfitting() -> None:
    # The first has the lower test loss, but was never the incumbent.
    found = SearchState((training(0, 0.9, 1.0, excesses=(0.5,)), training(1, 0.5, 0.5, excesses=(-0.5,))))
    assert verdict(found, False, {0: 0.1, 1: 0.9}) == "budget exhausted"
    assert verdict(found.change(0, excesses=(-0.5,)), False, {0: 0.1, 1: 0.9}) == "validation set overfitted"
