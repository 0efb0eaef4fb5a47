"""Whole searches in one process, and what they must not do."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raybilevel._lower.training import TrainedLowerLevel, load_checkpoint, train
from raybilevel.errors import ProblemError
from raybilevel.methods import Default, Paper
from raybilevel.problem import Hyperparameters
from raybilevel.search import _local as local
from raybilevel.search._optimizer import BilevelOptimizer
from raybilevel.space import Parameter, Space
from tests.problems_for_tests import Recorder, Ridge, vector
from tests.tiny_problems import Parabola

SEED = 3  # not 0, at whose initial weights check_problem looks


def optimizer(problem: Ridge, method: Default | Paper | None = None) -> BilevelOptimizer:
    return BilevelOptimizer(problem.space, method or Default(), SEED)


def test_an_observation_is_in_the_units_of_the_cube():
    problem = Ridge(dimension=2)
    trained = TrainedLowerLevel(0.4, 0.5, {"decay": {"0": 2.0, "1": 3.0}, "other": 9.0}, 12.0, {})
    found = local.observe(problem.space, problem.config(vector(0.1, 10.0)), trained)
    width = math.log(1e4)
    assert found.lower_gradient == pytest.approx((2 * 0.1 * width, 3 * 10 * width), rel=1e-12)
    assert (found.lower_loss, found.upper_loss, found.passes, found.complete) == (0.4, 0.5, 12.0, True)


def test_a_search_ends_when_its_cost_is_spent():
    problem = Ridge(dimension=1)
    search = optimizer(problem)
    checkpoints = local.search(problem, search, cost=4.5)
    costs = search.state.costs()
    assert costs[-1] >= 4.5 > costs[-2]
    assert set(checkpoints) == {t.index for t in search.state.done}


def test_trainings_are_those_of_the_closed_form():
    problem = Ridge(dimension=2)
    search = optimizer(problem)
    local.search(problem, search, cost=8)
    for training in search.state.done:
        unit = vector(*training.unit)
        x = problem.values(unit)
        assert training.upper_loss == pytest.approx(problem.reduced(unit).item(), rel=1e-8)
        assert training.lower_loss == pytest.approx(problem.f(x, problem.solution(x)).item(), rel=1e-10)
        slope = torch.autograd.functional.jacobian(
            lambda u: problem.f(problem.values(u), problem.solution(problem.values(u))), unit
        )
        assert training.lower_gradient == pytest.approx(tuple(slope.tolist()), rel=1e-6, abs=1e-10)


def test_equal_searches_are_equal():
    states = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        search = optimizer(Ridge(dimension=2))
        local.search(Ridge(dimension=2), search, cost=8)
        states.append(repr(search.state))
    assert states[0] == states[1]


def test_a_broken_problem_is_refused_before_anything_is_trained():
    problem = Ridge(dimension=2)
    problem.epochs = 0
    search = optimizer(problem)
    with pytest.raises(ProblemError, match="epochs"):
        local.search(problem, search, cost=8)
    assert search.state.trainings == ()


def test_constants_reach_trainings_and_steps():
    class Shifted(Ridge):
        def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Any) -> Tensor:
            assert hyperparameters["kind"] == "a"
            return super().lower_loss(model, hyperparameters, batch) + hyperparameters["decay"]["shift"]

    problem = Shifted(dimension=2)
    plain, shifted = optimizer(problem), optimizer(problem)
    local.search(Ridge(dimension=2), plain, cost=8)
    local.search(problem, shifted, cost=8, constants={"decay": {"shift": 2.5}, "kind": "a"})
    assert len(shifted.state.steps) > 0
    first = (plain.state.trainings[0], shifted.state.trainings[0])
    assert first[1].lower_loss - first[0].lower_loss == pytest.approx(2.5, rel=1e-12)
    assert first[1].upper_loss == pytest.approx(first[0].upper_loss, rel=1e-10)


class Diverging(Ridge):
    """Trainings with a decay of weight 0 above 0.05 have no finite loss; there is plenty of room below."""

    def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Any) -> Tensor:
        loss = super().lower_loss(model, hyperparameters, batch)
        return loss * math.nan if model.training and hyperparameters["decay"]["0"].item() > 0.05 else loss


def test_trainings_that_diverge_count_as_failed_and_the_search_goes_on():
    problem = Diverging(dimension=2)
    search = optimizer(problem)
    local.search(problem, search, cost=12)
    statuses = {t.status for t in search.state.trainings}
    assert statuses == {"done", "failed"}
    assert len(search.state.steps) > 0 and search.state.cost >= 12


def test_a_step_that_diverges_does_not_end_the_search():
    # the descents of this learning rate overflow, whatever they are clipped to
    problem = Ridge(dimension=1)
    search = optimizer(problem, Paper(iterations=2, steps=5, learning_rates=(1e200,), momenta=(0.5,)))
    local.search(problem, search, cost=math.inf)
    assert all(step.failed for step in search.state.steps)


# The leak: weights that have seen validation data must not reach a training.

METHODS = {
    "default": Default(),
    "paper": Paper(iterations=2, steps=10, learning_rates=(0.05,), momenta=(0.5,)),
}


Searched = tuple[Recorder, BilevelOptimizer, dict[int, bytes]]


@pytest.fixture(scope="module", params=METHODS)
def searched(request: pytest.FixtureRequest) -> Searched:
    problem = Recorder(dimension=2)
    search = optimizer(problem, METHODS[request.param])
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(local, "check_search", lambda _, space, *rest: space)  # its steps are no trainings
        checkpoints = local.search(problem, search, cost=math.inf if request.param == "paper" else 12)
    assert len(search.state.steps) >= 2
    return problem, search, checkpoints


def test_every_training_of_a_search_starts_at_the_same_cold_weights(searched: Searched):
    problem, search, _ = searched
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        cold = problem.model().double().get_parameter("weight")
    assert len(problem.first) == len(search.state.trainings)
    assert all(torch.equal(weights, cold) for weights in problem.first)


def test_no_training_starts_where_a_descent_has_been(searched: Searched):
    problem, search, checkpoints = searched
    trained = [load_checkpoint(checkpoints[t.index])["model"]["weight"] for t in search.state.done]
    moved = [y for y in problem.descent if not any(torch.equal(y, weights) for weights in trained)]
    assert len(moved) >= 4  # descents were seen, and they left the trained weights
    assert not any(torch.equal(start, y) for start in problem.first for y in moved)


def test_what_a_search_trained_is_what_training_alone_gives(searched: Searched):
    """Nothing of the search is in a training: bitwise the same, optimizer state included."""
    _, search, checkpoints = searched
    for training in search.state.done:
        problem = Ridge(dimension=2)
        trained, checkpoint = train(problem, search.config_of(training), SEED)
        assert (trained.lower_loss, trained.upper_loss) == (training.lower_loss, training.upper_loss)
        assert checkpoint == checkpoints[training.index]


def test_a_training_by_lbfgs_whose_loss_is_nan_fails_and_the_search_goes_on():
    """The gradient is finite there, and torch's line search ends in an IndexError of its own."""

    class Hidden(Parabola):
        def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Any) -> Tensor:
            loss = super().lower_loss(model, hyperparameters, batch)
            return loss + math.nan if hyperparameters["x"]["a"].item() > 1.0 else loss

    search = BilevelOptimizer(Space((Parameter(("x", "a"), 1e-4, 1e2, log=True),)), Default(), SEED)
    local.search(Hidden(), search, cost=6)
    assert {training.status for training in search.state.trainings} == {"done", "failed"}
