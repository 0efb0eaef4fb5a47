from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raybilevel._lower.training import load_checkpoint, train
from raybilevel._parameter import Parameter
from raybilevel.errors import ConfigError
from raybilevel.methods import METHODS, Default, Paper, make_method
from raybilevel.methods import _default as default
from raybilevel.methods._base import UpperResult, UpperStep
from raybilevel.methods._default import is_new
from raybilevel.problem import Hyperparameters
from raybilevel.search._local import observe
from raybilevel.search_state import Origin, Proposal, SearchState, Status, StepRecord, Training
from raybilevel.space import Space, sobol_points
from tests.problems_for_tests import Ridge, unit_box, vector

METHOD = Default()


def training(
    index: int,
    upper: float = 1.0,
    unit: float | None = None,
    region: int | None = None,
    status: Status = "done",
    known: bool = False,
    predicted: float | None = None,
    origin: Origin | None = None,
) -> Training:
    origin = origin or ("start" if region is None else "region")
    where = 0.1 * index if unit is None else unit
    proposal = Proposal((where,), origin, region, predicted_upper_loss=predicted)
    finished = -1 if status == "pending" else index
    return Training(index, proposal, status, finished, 0.5, upper, (0.1,), 10.0, (0.2,) if known else None)


def state(*trainings: Training, steps: int = 0) -> SearchState:
    return SearchState(trainings, tuple(StepRecord(i, 0, 1.0) for i in range(steps)))


def plan(
    found: SearchState, *running: UpperStep, slots: int = 1, method: Default = METHOD, seed: int = 7
) -> UpperStep | None:
    return method.plan(found, running, slots, seed)


THREE = (training(0, 3.0, unit=0.0), training(1, 1.0, unit=0.4), training(2, 2.0, unit=0.8))


# By name.


def test_methods_by_name():
    assert make_method("default") == Default() and make_method("paper") == Paper()
    assert make_method("default", explore_every=3) == Default(explore_every=3)


@pytest.mark.parametrize("name", ["defalt", "", "Default"])
def test_an_unknown_method_names_those_there_are(name: str):
    with pytest.raises(ConfigError, match=f"unknown method '{name}'; choose one of {', '.join(sorted(METHODS))}"):
        make_method(name)


@pytest.mark.parametrize("name", METHODS)
def test_an_unknown_setting_names_those_there_are(name: str):
    with pytest.raises(ConfigError, match=rf"method '{name}' has no setting 'colour'; it has \w+, "):
        make_method(name, colour="red")


@pytest.mark.parametrize(
    "settings",
    [
        {"decrease": 0.0},
        {"decrease": 11.0},
        {"upper_share": -1.0},
        {"explore_every": 1},
        {"max_regions": 0},
        {"max_rows": 19},
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any]):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        make_method("default", **settings)


# Whether a step takes hypergradients.


@pytest.mark.parametrize(("trust", "taken", "due"), [
    (1.0, 8, True), (0.5, 8, True), (0.2, 3, True), (0.2, 4, False), (0.0, 2, True), (0.0, 3, False),
])  # fmt: skip
def test_the_less_hypergradients_are_trusted_the_fewer_are_taken(trust: float, taken: int, due: bool):
    steps = tuple(StepRecord(i, 0, 1.0 if i < taken else 0.0, trust=trust) for i in range(8))
    step = plan(replace(state(*THREE), steps=steps))
    assert step is not None and step.origin == "region"
    assert bool(step.targets) == due


# The start design.


@pytest.mark.parametrize(
    ("dimension", "slots", "count"), [(1, 1, 3), (1, 5, 5), (2, 1, 3), (2, 5, 5), (2, 9, 9), (20, 1, 3)]
)
def test_the_start_design_fills_the_slots(dimension: int, slots: int, count: int):
    design = METHOD.start_design(unit_box(dimension), slots, 0)
    assert design.shape == (count, dimension)
    assert design[:3].tolist() == [[u] * dimension for u in (0.5, 0.25, 0.75)]
    assert bool(((design >= 0) & (design <= 1)).all())
    if count > 3:
        assert torch.equal(design[3:], sobol_points(dimension, count - 3, 0))


@pytest.mark.parametrize(("by_values", "count"), [(0, 3), (1, 4), (4, 7), (6, 7)])
def test_the_start_design_has_more_points_for_what_is_searched_by_values(by_values: int, count: int):
    named = [Parameter((f"x{i}",), 0.0, 1.0, smooth=i >= by_values) for i in range(8)]
    design = METHOD.start_design(Space(tuple(named)), 1, 0)
    assert design.shape == (count, 8)
    assert design[:3, by_values:].tolist() == [[u] * (8 - by_values) for u in (0.5, 0.25, 0.75)]
    # Off the diagonal, and no two equal: the effect of each can be told from that of the others.
    assert all(len(set(point.tolist())) == by_values + 1 for point in design[1:3])


def test_the_start_design_may_be_the_centre_alone():
    assert Default(start_points=1).start_design(unit_box(4), 1, 0).tolist() == [[0.5] * 4]


# When it plans and what.


@pytest.mark.parametrize(
    "found",
    [
        state(),
        state(training(0, status="pending")),
        state(training(0, status="failed"), training(1, status="pending")),
        state(training(0), training(1, status="pending")),
        state(training(0), training(1), training(2, status="pending"), training(3, status="pending")),
    ],
)
def test_nothing_is_planned_before_most_of_the_design_is_done(found: SearchState):
    assert plan(found) is None


def test_the_first_step_is_a_region_around_the_best():
    step = plan(state(*THREE))
    assert step is not None
    assert (step.number, step.origin, step.centre, step.region, step.radius) == (0, "region", 1, 1, 0.2)
    assert (step.targets, step.rank, step.seed, step.pending) == ((1,), 0, 7, ())


def test_a_hypergradient_is_asked_for_once():
    known = state(THREE[0], training(1, 1.0, known=True), THREE[2])
    step = plan(known)
    assert step is not None and step.targets == ()


def test_a_hypergradient_that_was_not_found_is_not_asked_for_again():
    tried, newest = replace(THREE[1], hypergradient=()), replace(THREE[2], hypergradient=())
    step = plan(state(THREE[0], tried, THREE[2]))
    # Of the newest training there may be one.
    assert step is not None and step.targets == (2,)
    step = plan(state(THREE[0], tried, newest))
    assert step is not None and step.targets == ()


def test_a_regions_newest_training_is_differentiated_too():
    better = training(3, 1.2, unit=0.2, region=1, predicted=0.5)
    step = plan(state(THREE[0], training(1, 1.0, known=True), THREE[2], better, steps=1))
    assert step is not None
    assert (step.centre, step.targets) == (1, (3,))


def test_the_centre_moves_to_the_best_of_the_region():
    better = training(3, 0.5, unit=0.2, region=1, predicted=0.5)
    step = plan(state(*THREE, better, steps=1))
    assert step is not None
    assert (step.region, step.centre, step.targets) == (1, 3, (3,))


def test_without_hypergradients_nothing_is_differentiated():
    step = plan(state(*THREE), method=Default(hypergradients=False))
    assert step is not None and step.targets == ()


def test_a_target_is_claimed_by_one_step():
    first = plan(state(*THREE), slots=1)
    assert first is not None
    second = plan(state(*THREE), first, slots=1)
    assert second is not None
    assert (second.number, second.region, second.rank, second.targets) == (1, 1, 1, ())


def test_more_slots_open_more_regions():
    found, running = state(*THREE), []
    for _ in range(5):
        step = plan(found, *running, slots=5, method=Default(max_regions=2, explore_every=100))
        assert step is not None
        running.append(step)
    assert [step.region for step in running] == [1, 2, 1, 2, 1]
    assert [step.rank for step in running] == [0, 0, 1, 1, 2]


def test_what_is_under_way_is_told():
    step = plan(state(*THREE, training(3, unit=0.9, status="pending")))
    assert step is not None and step.pending == ((0.9,),)


@pytest.mark.parametrize(("number", "origin"), [(0, "region"), (4, "region"), (5, "global"), (11, "global")])
def test_one_step_in_six_explores(number: int, origin: str):
    step = plan(state(*THREE, steps=number))
    assert step is not None
    assert (step.number, step.origin, step.seed) == (number, origin, 7 + 1000 * number)


def test_half_of_the_explorations_fill_the_box():
    explored = training(3, 0.9, origin="global")
    step = plan(state(*THREE, explored, steps=5))
    assert step is not None and step.origin == "fill"
    filled = training(4, 0.8, origin="fill")
    step = plan(state(*THREE, explored, filled, steps=5))
    assert step is not None and step.origin == "global"


@pytest.mark.parametrize(("number", "origin"), [(5, "global"), (11, "fill"), (17, "global"), (23, "fill")])
@pytest.mark.parametrize("looked", [True, False])
def test_where_all_steps_look_at_the_box_one_in_twelve_fills_it(number: int, origin: str, looked: bool):
    explored = [training(3 + i, 0.9 - 0.01 * i, origin="global") for i in range(5)]
    in_vain = replace(THREE[0], hypergradient=()) if looked else THREE[0]
    found = state(in_vain, *THREE[1:], *explored, steps=number)
    step = plan(found, method=METHOD if looked else replace(METHOD, hypergradients=False))
    assert step is not None and step.origin == origin


def test_no_region_begins_beside_a_better_training():
    # of those outside, the best lies within a region's first radius of the left region's centre
    beside = training(3, 1.1, unit=0.55, origin="global")
    step = plan(replace(state(*THREE, beside), steps=(StepRecord(0, 1, 1.0, settled=1),)))
    assert step is not None and step.region == 2
    far = training(4, 1.3, unit=0.95, origin="global")
    step = plan(replace(state(*THREE, beside, far), steps=(StepRecord(0, 1, 1.0, settled=1),)))
    assert step is not None and step.region == 4


def test_a_region_that_settled_before_it_was_trained_in_does_not_begin_again():
    found = replace(state(*THREE), steps=(StepRecord(0, 1, 1.0, settled=1),))
    step = plan(found)
    assert step is not None and step.region == 2


def region_of(*members: Training) -> list[int]:
    return [region.began for region in METHOD.open_regions(state(*THREE, *members), ())]


def test_a_region_whose_steps_bring_nothing_is_left():
    # the median lies 1 above the lowest F: settled below a hundredth of that
    assert region_of(training(3, 0.5, region=1, predicted=0.5)) == [1]
    assert region_of(training(3, 0.999, region=1, predicted=0.999)) == []
    assert region_of(training(3, 0.999, region=1, predicted=0.5)) == [1]  # more was promised


def test_a_region_that_cannot_beat_another_is_left():
    members = [training(3 + i, 1.9 - 0.1 * i, region=2, predicted=1.5) for i in range(3)]
    assert region_of(*members[:2]) == [2]
    assert region_of(*members) == []


def test_a_region_that_a_step_found_settled_is_left():
    found = state(*THREE, training(3, 0.5, region=1, predicted=0.5))
    settled = replace(found, steps=(StepRecord(0, 1, 1.0, settled=1),))
    assert METHOD.open_regions(found, ()) != () and METHOD.open_regions(settled, ()) == ()
    assert METHOD.converged(settled) and not METHOD.converged(found)


def test_the_incumbent_is_the_lowest_f():
    best = METHOD.incumbent(state(*THREE))
    assert best is not None and best.index == 1
    assert METHOD.incumbent(state()) is None
    assert not METHOD.exhausted(state(*THREE))


# What a step does.


def trained_state(problem: Ridge, count: int) -> tuple[SearchState, Mapping[int, bytes]]:
    found, checkpoints = SearchState(), {}
    for i, unit in enumerate(METHOD.start_design(problem.space, count, 0)):
        config = problem.space.to_config(unit)
        trained, checkpoints[i] = train(problem, config)
        seen = observe(problem.space, config, trained)
        found = found.add(Proposal(tuple(unit.tolist()), "start")).change(
            i,
            status="done",
            finished=i,
            lower_loss=seen.lower_loss,
            upper_loss=seen.upper_loss,
            lower_gradient=seen.lower_gradient,
            passes=seen.passes,
        )
    return found, checkpoints


def run(method: Default, step: UpperStep, problem: Ridge, checkpoints: Mapping[int, bytes]) -> UpperResult:
    return method.run(problem, problem.space, {}, step, lambda index: load_checkpoint(checkpoints[index]))


def test_a_region_step():
    problem = Ridge(dimension=2)
    found, checkpoints = trained_state(problem, 6)
    step = plan(found)
    assert step is not None
    result = run(METHOD, step, problem, checkpoints)
    centre, proposal = vector(*found.trainings[step.centre].unit), result.proposal
    assert proposal is not None and (proposal.origin, proposal.region) == ("region", step.region)
    moved = vector(*proposal.unit) - centre
    assert 0 < moved.abs().max() <= step.radius + 1e-12
    (index,) = result.hypergradients
    gradient, exact = vector(*result.hypergradients[index]), torch.autograd.functional.jacobian(problem.reduced, centre)
    assert index == step.centre
    assert (gradient - exact).norm() < 0.1 * exact.norm()
    assert gradient @ moved < 0  # downhill
    assert result.record.passes > 0 and result.record.multiplier is not None


def test_a_step_goes_on_without_a_checkpoint_that_cannot_be_read():
    problem = Ridge(dimension=2)
    found, checkpoints = trained_state(problem, 6)
    step = plan(found)
    assert step is not None
    (damaged,) = step.targets
    result = run(METHOD, step, problem, {**checkpoints, damaged: checkpoints[damaged][:100]})
    assert result.proposal is not None and result.record.multiplier is None
    assert result.hypergradients == {damaged: ()}  # not to be tried again
    assert list(result.unreadable) == [damaged] and "checkpoint" in result.unreadable[damaged]


def test_a_step_is_a_pure_function():
    problem = Ridge(dimension=2)
    found, checkpoints = trained_state(problem, 6)
    step = plan(found)
    assert step is not None
    results = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        results.append(run(METHOD, step, problem, checkpoints))
    assert results[0] == results[1]


class NotFinite(Ridge):
    """Upper-level steps find no finite F: trainings look at it without gradients."""

    def upper_loss(self, model: nn.Module, batch: Any) -> Tensor:
        return super().upper_loss(model, batch) * (math.nan if torch.is_grad_enabled() else 1.0)


def test_a_descent_that_is_not_finite_leaves_its_hypergradient_out():
    problem = NotFinite(dimension=2)
    found, checkpoints = trained_state(problem, 6)
    step = plan(found)
    assert step is not None
    result = run(METHOD, step, problem, checkpoints)
    assert result.hypergradients == {step.centre: ()}
    assert result.proposal is not None and result.record.multiplier is None
    assert result.record.passes > 0


def test_trainings_that_are_too_short_for_hypergradients_have_none(caplog: pytest.LogCaptureFixture):
    default.say_too_short.cache_clear()
    problem = Ridge(dimension=2, optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1), epochs=8)
    found, checkpoints = trained_state(problem, 6)
    step = plan(found)
    assert step is not None
    for _ in range(2):
        result = run(METHOD, step, problem, checkpoints)
        assert (result.hypergradients, result.record.passes) == ({step.centre: ()}, 0)
        assert result.proposal is not None
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("Ridge: hypergradients: off, trainings are too short for them to pay")


def test_a_step_keeps_to_the_memory_that_it_asks_for(caplog: pytest.LogCaptureFixture):
    problem = Ridge(dimension=6)
    found, checkpoints = trained_state(problem, 6)
    step = plan(found)
    assert step is not None
    whole = run(METHOD, step, problem, checkpoints).record.passes
    vector_bytes = 8 * 6
    less = run(METHOD, replace(step, most_memory=32 * vector_bytes), problem, checkpoints)  # one product
    assert less.hypergradients[step.centre] and less.record.passes < whole
    none = run(METHOD, replace(step, most_memory=31 * vector_bytes), problem, checkpoints)
    assert (none.hypergradients, none.record.passes) == ({step.centre: ()}, 0) and none.proposal is not None
    assert "Ridge: hypergradients: off, 6 weights are too many for the 1.49e+03 bytes" in caplog.messages[-1]


def test_the_precision_of_torch_is_full_within_a_step():
    class Coarse(Ridge):
        def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Any) -> Tensor:
            if not model.training:
                seen.add(torch.backends.cudnn.conv.fp32_precision)
            return super().lower_loss(model, hyperparameters, batch)

    seen: set[str] = set()
    problem = Coarse(dimension=2)
    found, checkpoints = trained_state(problem, 6)
    assert seen == {"tf32"}  # torch's own default
    seen.clear()
    step = plan(found)
    assert step is not None
    assert run(METHOD, step, problem, checkpoints).hypergradients[step.centre]
    assert seen == {"ieee"}


@pytest.mark.parametrize("origin", ["global", "fill"])
def test_an_exploring_step_takes_no_descent(origin: str):
    problem = Ridge(dimension=2)
    found, checkpoints = trained_state(problem, 6)
    step = plan(found)
    assert step is not None
    result = run(METHOD, replace(step, origin=origin, targets=(), region=None), problem, checkpoints)
    assert result.proposal is not None and result.proposal.origin == origin
    assert all(0 <= u <= 1 for u in result.proposal.unit)
    assert (dict(result.hypergradients), result.record.passes) == ({}, 0.0)


def test_a_proposal_is_told_with_what_is_expected_of_it():
    problem = Ridge(dimension=2)
    found, checkpoints = trained_state(problem, 12)
    step = plan(found)
    assert step is not None
    proposal = run(METHOD, step, problem, checkpoints).proposal
    assert proposal is not None and proposal.predicted_upper_loss is not None
    unit = vector(*proposal.unit)
    spread = max(t.upper_loss for t in found.done) - min(t.upper_loss for t in found.done)
    assert proposal.predicted_upper_loss == pytest.approx(problem.reduced(unit).item(), abs=0.1 * spread)


@pytest.mark.parametrize("origin", ["region", "global"])
def test_values_and_gradients_of_f_decide_nothing(origin: Origin):
    problem = Ridge(dimension=2)
    found, checkpoints = trained_state(problem, 6)
    step = plan(found)
    assert step is not None
    step, other = replace(step, origin=origin), found
    for i in range(6):
        # As where f has an infinite slope in x, of which nothing is known.
        other = other.change(i, lower_loss=float(i), lower_gradient=(math.nan, math.nan))
    results = [run(METHOD, replace(step, state=state), problem, checkpoints) for state in (found, other)]
    assert results[0] == results[1]
    proposal, record = results[0].proposal, results[0].record
    # Nothing is said of a model of v, as there is none.
    assert proposal is not None and proposal.predicted_value is proposal.deviation is record.violation is None


def test_a_step_that_would_train_the_same_again_looks_elsewhere():
    # the only place in a region of no width is its centre
    problem = Ridge(dimension=2)
    found, checkpoints = trained_state(problem, 6)
    step = plan(found)
    assert step is not None
    result = run(METHOD, replace(step, radius=1e-4), problem, checkpoints)
    assert result.record.settled == step.region
    assert result.proposal is not None and result.proposal.origin in ("global", "fill")
    assert is_new(vector(*result.proposal.unit), step)


@pytest.mark.parametrize(
    ("unit", "expected"), [(0.4, False), (0.4005, False), (0.402, True), (0.9, False), (0.5, True)]
)
def test_what_is_new(unit: float, expected: bool):
    step = plan(state(*THREE, training(3, unit=0.9, status="pending")))
    assert step is not None
    assert is_new(vector(unit), step) == expected


@pytest.mark.parametrize(
    ("done", "starting", "begins"), [(1, 1, False), (2, 1, True), (4, 4, False), (8, 40, False), (9, 40, True)]
)
def test_steps_begin_when_half_of_the_start_design_is_done_or_eight_of_it(done: int, starting: int, begins: bool):
    trainings = [training(i, float(i), unit=i / 50) for i in range(done)]
    trainings += [training(done + i, unit=1 - i / 50, status="pending") for i in range(starting)]
    assert (plan(state(*trainings), slots=50) is not None) == begins
