"""Constraints on reported metrics, without Ray."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from raybilevel._models.acquisition import fit_upper_model, most_feasible
from raybilevel._models.constraints import Feasible, MetricProcess, feasible_first, fit_metrics
from raybilevel.errors import ConfigError, ProblemError
from raybilevel.methods import Default, Paper
from raybilevel.methods._trust_region import TrustRegionRule
from raybilevel.search import BilevelOptimizer, Observation, search
from raybilevel.search_state import Proposal, SearchState, Status, Training
from raybilevel.space import Parameter, Space, sobol_points
from tests.problems_for_tests import unit_box, vector
from tests.tiny_problems import Parabola

SPACE = Space((Parameter(("x", "a"), 1e-2, 1e2, log=True),))


def training(
    index: int, upper: float, excesses: tuple[float, ...] = (), unit: tuple[float, ...] = (), status: Status = "done"
) -> Training:
    proposal = Proposal(unit or (0.1 * index,), "start")
    finished = -1 if status == "pending" else index
    return Training(index, proposal, status, finished, 0.5, upper, (0.1,), 10.0, excesses=excesses)


def state(*trainings: Training) -> SearchState:
    return SearchState(trainings)


def process(count: int = 12) -> MetricProcess:
    """Of the excess x_0 - 0.4: feasible on the left."""
    points = sobol_points(2, count, 1)
    (found,) = fit_metrics(
        [training(i, 1.0, (unit[0] - 0.4,), tuple(unit)) for i, unit in enumerate(points.tolist())],
        vector(0.5, 0.5),
        500,
    )
    return found


# The order of trainings.


def test_a_feasible_training_is_before_any_other_and_among_others_the_nearest_to_that():
    trainings = [
        training(0, 1.0, (0.5,)),
        training(1, 2.0, (0.1,)),
        training(2, 5.0, (-1.0,)),
        training(3, 4.0, (0.0,)),
    ]
    assert [t.feasible for t in trainings] == [False, False, True, True]
    assert sorted(range(4), key=lambda i: trainings[i].rank) == [3, 2, 1, 0]
    # Excesses of kept bounds do not make up for those of others.
    assert training(0, 1.0, (0.5, -3.0)).excess == 0.5
    assert not training(0, 1.0, (math.nan,)).feasible and training(0, 1.0, (math.nan,)).excess == math.inf


def test_the_best_of_a_search_is_feasible_however_it_is_worked_out():
    told = [(3.0, (0.1,)), (1.0, (0.2,)), (2.0, (-0.1,)), (0.5, (0.3,)), (1.5, (0.0,))]
    grown, best = state(), []
    for i, (upper, excesses) in enumerate(told):
        grown = grown.add(Proposal((0.1 * i,), "start"))
        grown = grown.change(i, status="done", finished=i, upper_loss=upper, excesses=excesses)
        assert grown.best is not None and grown.best == SearchState(grown.trainings).best
        best.append(grown.best.index)
    assert best == [0, 0, 2, 2, 4]


def test_trainings_that_break_a_constraint_are_judged_behind_all_others():
    found = state(
        training(0, 1.0, (0.5,)), training(1, 3.0, (-0.1,)), training(2, 2.0, (math.nan,), status="stopped"),
        training(3, 1.5, (0.25,)), training(4, math.nan, status="failed"), training(5, math.nan, status="pending"),
    )  # fmt: skip
    upper = [t.upper_loss for t in feasible_first(found).trainings]
    # The highest F is 3, the range of F is 2: 3 + 2 e / (1 + e).
    assert upper[:4] == pytest.approx([3 + 2 / 3, 3.0, 5.0, 3.4])
    assert feasible_first(found).best == found.best == found.trainings[1]


def test_a_training_that_breaks_a_constraint_is_no_failure_of_the_model_of_f():
    # Predicted was 1.5: the ratio test would halve the radius of a region if F had risen.
    def region(excess: float) -> SearchState:
        second = training(1, 2.5, (excess,))
        proposal = Proposal(second.unit, "region", 0, predicted_upper_loss=1.5)
        return feasible_first(state(training(0, 2.0, (-0.1,)), replace(second, proposal=proposal)))

    kept, broken = (TrustRegionRule().replay(region(excess), (0,))[0] for excess in (-0.1, 0.1))
    assert kept.radius < broken.radius == TrustRegionRule().initial and broken.centre == 0


def test_without_constraints_a_search_is_judged_as_it_is():
    for found in (state(), state(training(0, 1.0)), state(training(0, math.nan, status="failed"))):
        assert feasible_first(found) is found


# The models.


def test_the_side_that_keeps_a_bound_is_told_from_the_other():
    left, right = process().log_probability(vector(0.2, 0.5, 0.8, 0.5).reshape(2, 2)).exp().tolist()
    assert left > 0.99 and right < 0.01


def test_the_probability_is_that_of_the_posterior():
    found, x = process(2), vector(0.7, 0.5)
    mean, deviation = found.process.mean(x), found.process.deviation(x)
    expected = torch.distributions.Normal(mean, deviation).cdf(torch.zeros(()))
    assert 0.01 < expected < 0.99
    assert found.log_probability(x).exp().item() == pytest.approx(expected.item(), rel=1e-6)
    # Independent parts: the product.
    assert Feasible((found, found)).log_probability(x).item() == pytest.approx(2 * expected.log().item(), rel=1e-6)


def test_the_probability_is_differentiable():
    x = sobol_points(2, 3, 5).requires_grad_(True)
    torch.autograd.gradcheck(process(5).log_probability, x)


def test_the_unit_of_a_metric_does_not_matter():
    x, excess = sobol_points(2, 8, 1), sobol_points(2, 8, 1)[:, 0] - 0.4
    one, other = (MetricProcess.of(x, factor * excess).log_probability(vector(0.42, 0.3)) for factor in (1.0, 1e6))
    assert one.item() == pytest.approx(other.item(), rel=1e-6)


def test_what_is_not_known_of_a_metric_is_left_out():
    measured = [training(i, 1.0, (math.nan, 0.1 * i - 0.2)) for i in range(4)]
    assert len(fit_metrics(measured, vector(0.5), 500)) == 1
    assert fit_metrics([training(0, 1.0)], vector(0.5), 500) == ()


def test_without_a_feasible_training_the_likeliest_point_is_sought():
    trainings = [
        training(i, 1 - u[0], (u[0] - 0.1,), tuple(u)) for i, u in enumerate((sobol_points(2, 6, 1) / 2 + 0.5).tolist())
    ]
    model = fit_upper_model(trainings, [], vector(0.5, 0.5), 500)
    assert model.best is None
    found = Feasible(fit_metrics(trainings, vector(0.5, 0.5), 500))
    point = most_feasible(model, found, vector(0.0, 0.0), vector(1.0, 1.0), [vector(0.7, 0.7)], 0)
    assert point[0] < 0.4  # F falls to the right


def test_the_model_of_f_has_the_best_feasible_training_for_its_incumbent():
    trainings = [
        training(0, 1.0, (0.5,)),
        training(1, 3.0, (-0.5,)),
        training(2, 2.0, (-0.5,)),
        training(3, 4.0, (0.5,)),
    ]
    model = fit_upper_model(trainings, [], vector(0.5), 500)
    assert model.best is not None
    assert model.warp.inverse(model.process.shift + model.process.scale * model.best) == pytest.approx(2.0)


# The search.


def test_a_metric_that_is_not_returned_is_named():
    with pytest.raises(ProblemError, match="constraints: evaluate does not return latency_ms"):
        search(Parabola(), BilevelOptimizer(SPACE, Default()), 2, constraints={"latency_ms": "<= 5"})


def test_a_method_that_takes_no_constraints_refuses_them():
    with pytest.raises(ConfigError, match="constraints: Paper takes none; use method='default'"):
        search(Parabola(), BilevelOptimizer(SPACE, Paper()), 2, constraints={"score": "<= 5"})


@pytest.mark.parametrize(("complete", "status"), [(True, "failed"), (False, "stopped")])
def test_a_whole_training_with_a_metric_that_is_not_finite_has_failed(complete: bool, status: str):
    optimizer = BilevelOptimizer(unit_box(1), Default())
    optimizer.ask("t")
    optimizer.tell("t", Observation(1.0, 1.0, (0.0,), 1.0, complete, excesses=(math.nan,)))
    assert optimizer.state.trainings[0].status == status
