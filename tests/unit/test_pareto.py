"""Several objectives, without Ray."""

from __future__ import annotations

import math

import pytest
import torch
from botorch.acquisition.multi_objective import logei
from botorch.utils.multi_objective.hypervolume import Hypervolume

from raybilevel._models.acquisition import fit_upper_model
from raybilevel._models.constraints import Feasible, fit_metrics
from raybilevel._models.pareto import FrontModel, front, objectives
from raybilevel._objectives import OtherObjective, as_written, read_others, split
from raybilevel.errors import ConfigError, ProblemError
from raybilevel.methods import Default, Paper
from raybilevel.search import BilevelOptimizer, Observation, search
from raybilevel.search_state import Proposal, SearchState, Status, Training
from raybilevel.space import Parameter, Space, sobol_points
from tests.problems_for_tests import unit_box, vector
from tests.tiny_problems import Parabola

SPACE = Space((Parameter(("x", "a"), 1e-2, 1e2, log=True),))


def training(
    index: int,
    upper: float,
    others: tuple[float, ...],
    unit: tuple[float, ...] = (0.5,),
    excesses: tuple[float, ...] = (),
    status: Status = "done",
) -> Training:
    return Training(
        index, Proposal(unit, "start"), status, index, 0.5, upper, (0.1,) * len(unit), 10.0,
        excesses=excesses, others=others,
    )  # fmt: skip


# What is asked for.


def test_metrics_and_modes_are_split_as_optuna_search_takes_them():
    assert split("loss", "max") == ("loss", "max", ())
    assert split(None, None) == (None, None, ())
    assert split(["loss", "ms"], ["max", "min"]) == ("loss", "max", (OtherObjective("ms", "min"),))
    assert split(["loss", "ms"], "max") == ("loss", "max", (OtherObjective("ms", "max"),))
    assert split(["loss"], None) == ("loss", "min", ())


@pytest.mark.parametrize(
    ("metric", "mode", "message"),
    [
        (["a", "b"], ["min"], "as many modes as metrics"),
        ([], [], "at least one"),
        (["a", "a"], ["min", "max"], "each metric once"),
        ("a", ["min"], "needs a list of as many metrics"),
        (["a", "b"], ["min", "low"], "b: expected 'min' or 'max', got 'low'"),
    ],
)
def test_metrics_and_modes_that_do_not_fit_are_refused(metric: list[str], mode: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        split(metric, mode)


def test_other_objectives_are_read_and_written():
    written = {"size": "min", "recall": "max"}
    others = read_others(written)
    assert as_written(others) == written and read_others(None) == ()
    assert [other.minimised(2.0) for other in others] == [2.0, -2.0]
    with pytest.raises(ConfigError, match="expected a mapping such as"):
        read_others(["size"])  # type: ignore[arg-type]


# The front.


def test_the_front_has_what_nothing_beats():
    values = [(3.0, 1.0), (1.0, 3.0), (2.0, 2.0), (2.5, 2.5), (2.0, 2.0), (1.0, 4.0)]
    found = front(SearchState(tuple(training(i, f, (g,)) for i, (f, g) in enumerate(values))))
    assert [objectives(t) for t in found] == [(1.0, 3.0), (2.0, 2.0), (3.0, 1.0)]


def test_the_front_is_of_trainings_that_keep_the_constraints_if_any_does():
    best, kept = training(0, 1.0, (1.0,), excesses=(0.5,)), training(1, 2.0, (2.0,), excesses=(-0.5,))
    assert front(SearchState((best, kept))) == (kept,)
    assert front(SearchState((best,))) == (best,)
    assert front(SearchState()) == () == front(SearchState((training(0, 1.0, (1.0,), status="stopped"),)))


def test_without_other_objectives_the_front_is_the_lowest_f():
    trainings = tuple(training(i, f, ()) for i, f in enumerate((2.0, 1.0, 3.0)))
    assert front(SearchState(trainings)) == (trainings[1],)


# The models.


def two_minima(unit: tuple[float, ...]) -> tuple[float, float]:
    """Squared distances from 0.2 and from 0.8 on the diagonal: the front is the segment between them."""
    return sum((u - 0.2) ** 2 for u in unit), sum((u - 0.8) ** 2 for u in unit)


def measured(points: torch.Tensor, bounded: bool = False) -> SearchState:
    trainings = []
    for i, unit in enumerate(map(tuple, points.tolist())):
        f, g = two_minima(unit)
        trainings.append(training(i, f, (g,), unit, excesses=(0.5 - unit[0],) if bounded else ()))
    return SearchState(tuple(trainings))


def model_of(state: SearchState, pending: tuple[torch.Tensor, ...] = ()) -> FrontModel:
    centre = torch.full((2,), 0.5, dtype=torch.double)
    upper = fit_upper_model(state.measured, [], centre, 500)
    found = FrontModel.of(state, upper, pending, centre, 500)
    assert found is not None
    return found


def test_a_point_is_proposed_that_enlarges_the_front():
    state = measured(sobol_points(2, 10, 3))
    point = model_of(state).propose(seed=0)
    # Near the segment, of which no training has been.
    assert (point[0] - point[1]).abs() < 0.1 and 0.1 < point.mean() < 0.9
    f, g = two_minima(tuple(point.tolist()))
    assert not any(t.upper_loss <= f and t.others[0] <= g for t in state.done)


def test_nothing_is_compiled_for_it():
    model_of(measured(sobol_points(2, 4, 3))).acquisition(seed=0)
    assert logei._C is None


def test_a_pending_point_is_not_proposed_again():
    state = measured(sobol_points(2, 10, 3))
    first = model_of(state).propose(seed=0)
    second = model_of(state, (first,)).propose(seed=0)
    assert (first - second).norm() > 0.05
    assert torch.equal(first, model_of(state).propose(seed=0))


def test_where_trainings_break_constraints_nothing_is_proposed():
    state = measured(sobol_points(2, 12, 3), bounded=True)  # feasible on the right
    kept = Feasible(fit_metrics(state.measured, vector(0.5, 0.5), 500))
    assert model_of(state).propose(seed=0, factors=[kept.log_probability])[0] > 0.45


def test_a_training_without_an_objective_is_left_out():
    state = measured(sobol_points(2, 6, 3))
    stopped = training(6, 0.1, (math.nan,), (0.3, 0.4), status="stopped")
    assert len(model_of(SearchState((*state.trainings, stopped))).known) == 6


# The search.


def volume(values: list[tuple[float, ...]]) -> float:
    """Dominated, below 1 in both objectives."""
    return Hypervolume(ref_point=-torch.ones(2)).compute(-torch.tensor(values))


def test_a_search_by_values_covers_the_front():
    optimizer = BilevelOptimizer(unit_box(2), Default(hypergradients=False), seed=1)
    problem = Parabola()
    for number in range(16):
        while (step := optimizer.plan()) is not None:
            optimizer.tell_step(step.number, optimizer.run(problem, {}, step, {}.__getitem__))
        config = optimizer.ask(str(number))
        assert config is not None
        f, g = two_minima(optimizer.state.trainings[-1].unit)
        optimizer.tell(str(number), Observation(f, 0.0, (0.0, 0.0), 1.0, others=(g,)))
    assert {t.proposal.origin for t in optimizer.state.trainings} == {"start", "front"}
    truth = volume([two_minima((u, u)) for u in torch.linspace(0.2, 0.8, 200).tolist()])
    # Sixteen points of a Sobol sequence reach 0.90 to 0.93 of it.
    assert volume([objectives(t) for t in front(optimizer.state)]) > 0.96 * truth


def test_hypergradients_of_the_front_are_taken_and_its_ends_are_known():
    optimizer = BilevelOptimizer(SPACE, Default(upper_share=5.0), seed=0)
    search(Parabola(), optimizer, cost=30, other_objectives={"score": "max"})
    state = optimizer.state
    # F is least at x = 0.1 and the score, -|y|, at x = 1.
    found = [optimizer.config_of(t)["x"]["a"] for t in front(state)]
    assert len(found) >= 4 and found[0] == pytest.approx(0.1, rel=0.2) and found[-1] == pytest.approx(1.0, rel=0.2)
    assert any(t.hypergradient for t in state.done) and state.shrinkage is None
    assert optimizer.best == front(state)[0] and not optimizer.method.converged(state)


def test_an_objective_that_is_not_returned_is_named():
    with pytest.raises(ProblemError, match="other_objectives: evaluate does not return latency_ms"):
        search(Parabola(), BilevelOptimizer(SPACE, Default()), 2, other_objectives={"latency_ms": "min"})


def test_a_method_that_searches_one_metric_refuses_others():
    with pytest.raises(ConfigError, match="Paper searches one metric, not score too; use method='default'"):
        search(Parabola(), BilevelOptimizer(SPACE, Paper()), 2, other_objectives={"score": "max"})


@pytest.mark.parametrize(("complete", "status"), [(True, "failed"), (False, "stopped")])
def test_a_whole_training_with_an_objective_that_is_not_finite_has_failed(complete: bool, status: str):
    optimizer = BilevelOptimizer(unit_box(1), Default())
    optimizer.ask("t")
    optimizer.tell("t", Observation(1.0, 1.0, (0.0,), 1.0, complete, others=(math.nan,)))
    assert optimizer.state.trainings[0].status == status
