from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from raybilevel._models.acquisition import UpperModel, fit_upper_model, minimise_in_box
from raybilevel._models.generalisation import (
    STRENGTHS,
    Surface,
    curvatures,
    learn,
    modes,
    orthonormal,
    penalised_minimum,
    selected,
)
from raybilevel._models.shrinkage import GroupPenalty, negative_log_likelihood, off_mean
from raybilevel._models.trust import promises, trust
from raybilevel.errors import SpaceError
from raybilevel.methods import Default
from raybilevel.methods._default import PLAIN_STEPS, say_once
from raybilevel.search import BilevelOptimizer, new_data, search
from raybilevel.search_state import Likelihood, Proposal, Shrinkage, Training
from raybilevel.space import sobol_points
from raybilevel.tune._view import SearchView
from tests.problems_for_tests import vector
from tests.tiny_problems import Means

D = 5
GROUP = (tuple(range(D)),)
BENT = torch.tensor([3.0, 1.0, 0.5, 2.0, 0.2], dtype=torch.double)
TARGET = torch.tensor([0.2, 0.35, 0.5, 0.4, 0.7], dtype=torch.double)


def valley(x: Tensor) -> Tensor:
    return 0.5 + (BENT * (x - TARGET).square()).sum(-1) / 2 + 0.3 * (x[..., 0] - x[..., 1]).pow(4)


def observed(function: Callable[[Tensor], Tensor], points: Tensor) -> list[Training]:
    found = []
    for i, point in enumerate(points):
        x = point.clone().requires_grad_()
        value = function(x)
        (slope,) = torch.autograd.grad(value, x)
        slopes = tuple(slope.tolist()) if i % 2 == 0 else None  # values alone, too
        proposal = Proposal(tuple(point.tolist()), "region")
        found.append(Training(i, proposal, "done", i, upper_loss=value.item(), hypergradient=slopes))
    return found


def fitted() -> UpperModel:
    trainings = observed(valley, sobol_points(D, 10, 1))
    return fit_upper_model(trainings, [torch.full((D,), 0.45).double()], torch.full((D,), 0.5).double(), 500)


def test_a_squared_error_that_is_modelled_as_negative_is_not_believed() -> None:
    points = vector(0.5, 0.5, 0.8, 0.5, 0.95, 0.4).reshape(3, 2)
    model = fit_upper_model(observed(lambda x: 0.01 + 5 * (x[0] - 0.5) + 0 * x[1], points), [], vector(0.5, 0.5), 500)
    surface, beyond = Surface.of(model, "squared_error"), vector(0.35, 0.5)
    assert model.mean(beyond) < 0
    # A tenth of the lowest error seen.
    assert surface.value(beyond) == pytest.approx(math.log(0.001) / 2)
    assert surface.hessian(beyond).isfinite().all()


class Quadratic(Surface):
    """G = (x - c)' H (x - c) / 2."""

    @classmethod
    def make(cls, hessian: Tensor, centre: Tensor) -> Quadratic:
        made = cls(centre, centre, hessian, centre, 0.0, 0.0, 1.0, 0.0, 0.0, "log_likelihood")
        return made

    @property
    def differentiated(self) -> Tensor:
        return sobol_points(D, 5, 1)

    def value_and_gradient(self, x: Tensor) -> tuple[float, Tensor]:
        slope = self.derivative_weights @ (x - self.points)
        return ((x - self.points) @ slope).item() / 2, slope

    def hessian(self, x: Tensor) -> Tensor:
        return self.derivative_weights


@pytest.mark.parametrize("likelihood", ["log_likelihood", "squared_error"])
def test_the_closed_form_is_the_posterior_mean_and_its_derivatives(likelihood: Likelihood) -> None:
    model = fitted()
    surface = Surface.of(model, likelihood)

    def reference(x: Tensor) -> Tensor:
        z = model.process.mean(x)
        return negative_log_likelihood(z.exp() + model.warp.low - model.warp.spread, likelihood)

    for x in (torch.full((D,), 0.4).double(), TARGET, sobol_points(D, 3, 5)[2]):
        point = x.clone().requires_grad_()
        value = reference(point)
        (slope,) = torch.autograd.grad(value, point)
        found = surface.value_and_gradient(x)
        assert found[0] == pytest.approx(value.item(), abs=1e-8)
        assert torch.allclose(found[1], slope, atol=1e-7)
        step = 1e-4
        differences = torch.stack(
            [
                (surface.value_and_gradient(x + step * e)[1] - surface.value_and_gradient(x - step * e)[1]) / (2 * step)
                for e in torch.eye(D, dtype=torch.double)
            ]
        )
        # central differences: an error of the order of the step squared
        assert torch.allclose(surface.hessian(x), differences, atol=1e-5)


def test_the_evidence_of_a_quadratic_is_exact() -> None:
    """exp(-n G) and Gaussian differences within the group integrate in closed form: dense algebra is the reference."""
    projection = torch.eye(D).double() - torch.full((D, D), 1 / D).double()
    bends = torch.tensor([2.0, 3.0, 1.0, 0.4, 5.0], dtype=torch.double)
    basis = torch.linalg.eigh(projection).eigenvectors  # the mean's direction first: H does not couple it with the rest
    hessian, centre, n = basis @ torch.diag(bends) @ basis.T, 0.5 + (TARGET - 0.5) / 4, 40

    def log_marginal(tau: float) -> float:
        precision = n * (hessian + tau * projection)
        best = torch.linalg.solve(precision, n * hessian @ centre)
        merit = (best - centre) @ hessian @ (best - centre) + tau * best @ projection @ best
        prior = (D - 1) / 2 * math.log(n * tau)
        return (-n * merit / 2 - torch.linalg.slogdet(precision).logabsdet / 2).item() + prior

    strengths = (30.0, 3.0, 0.3)  # at none of which a bound of the box is active
    found = list(modes(Quadratic.make(hessian, centre), GROUP, n, centre, projection, strengths))
    told = [mode.evidence - found[0].evidence for mode in found]
    assert told == pytest.approx(
        [log_marginal(tau) - log_marginal(strengths[0]) for tau in strengths], abs=1e-4
    )  # where L-BFGS-B ends
    for mode in found:
        exact = torch.linalg.solve(hessian + mode.strength * projection, hessian @ centre)
        assert torch.allclose(mode.x, exact, atol=1e-3)  # as far as L-BFGS-B goes for a gain of 1e-7
        assert mode.supported == pytest.approx(1 + (bends[1:] / (bends[1:] + mode.strength)).sum().item())


class TwoValleys(Surface):
    """G = -log(exp(-10 |x - 0.2|^2 - 0.5) + exp(-10 |x - c|^2)): the one around c is lower, the other on the mean."""

    @classmethod
    def make(cls, centre: Tensor) -> TwoValleys:
        return cls(centre, centre, torch.eye(D).double(), centre, 0.0, 0.0, 1.0, 0.0, 0.0, "log_likelihood")

    def of_point(self, x: Tensor) -> Tensor:
        valleys = torch.stack([-10 * (x - 0.2).square().sum() - 0.5, -10 * (x - self.points).square().sum()])
        return -valleys.logsumexp(0)

    def value_and_gradient(self, x: Tensor) -> tuple[float, Tensor]:
        point = x.clone().requires_grad_()
        value = self.of_point(point)
        return value.item(), torch.autograd.grad(value, point)[0]

    def hessian(self, x: Tensor) -> Tensor:
        found = torch.autograd.functional.hessian(self.of_point, x)
        assert isinstance(found, Tensor)
        return found


def test_a_valley_on_the_way_from_the_mean_does_not_hide_the_one_around_the_best() -> None:
    around = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0], dtype=torch.double)
    surface = TwoValleys.make(around)
    found = list(modes(surface, GROUP, 500, around, off_mean(torch.eye(D).double(), GROUP)))
    assert (found[0].x - 0.2).abs().max() < 0.05  # under the strongest the other valley is lower
    assert (found[-1].x - around).abs().max() < 0.05
    best = found[selected([mode.evidence for mode in found])]
    assert (best.x - around).abs().max() < 0.1 and best.supported > 3


def test_directions_that_were_not_seen_get_the_median_curvature() -> None:
    hessian = torch.diag(torch.tensor([4.0, 1.0, -2.0, 9.0, 9.0]).double())
    seen = torch.tensor([[1.0, 0, 0, 0, 0], [2.0, 0, 0, 0, 0], [0, 0.5, 0, 0, 0], [0, 0, 1.0, 0, 0]]).double()
    basis = orthonormal(seen)
    assert basis.shape == (5, 3)
    assert curvatures(hessian, basis, 5).sort().values.tolist() == pytest.approx([0.0, 1.0, 1.0, 1.0, 4.0])
    assert curvatures(hessian, orthonormal(torch.zeros(0, 5).double()), 4).tolist() == [0.0] * 4
    assert curvatures(hessian, orthonormal(torch.zeros(2, 5).double()), 4).tolist() == [0.0] * 4


def test_the_strongest_within_a_nat_is_taken() -> None:
    assert selected([-3.0, -0.9, 0.0, -0.5]) == 1


def test_evidence_that_is_flat_holds_nothing() -> None:
    assert selected([0.0, -0.1, -0.5, -0.9]) == 3


def test_the_evidence_of_the_last_three_steps_counts_alike() -> None:
    surface = Quadratic.make(torch.diag(BENT), TARGET)
    found = learn(surface, GROUP, 100, TARGET)
    assert max(found.evidence) == 0 and len(found.evidence) == len(STRENGTHS)
    assert found.strength == STRENGTHS[selected(found.evidence)]
    strongest = tuple(-100.0 * place for place in range(len(STRENGTHS)))
    both = learn(surface, GROUP, 100, TARGET, (strongest, strongest))
    assert both.evidence == found.evidence and both.strength == STRENGTHS[0]
    mean = [(one + other) / 2 for one, other in zip(found.evidence, strongest, strict=True)]
    assert learn(surface, GROUP, 100, TARGET, (strongest,)).strength == STRENGTHS[selected(mean)]
    assert learn(surface, GROUP, 100, TARGET, (strongest, found.evidence, found.evidence)).strength == found.strength


def test_without_groups_every_hyperparameter_counts() -> None:
    found = learn(Quadratic.make(torch.diag(BENT), TARGET), (), 100, TARGET)
    assert (found.supported, found.strength, found.mode) == (D, 0.0, tuple(TARGET.tolist()))


def test_hyperparameters_at_a_bound_do_not_follow_the_examples() -> None:
    centre = torch.tensor([-0.5, 0.4, 0.5, 0.6, 1.5], dtype=torch.double)
    hessian = torch.diag(torch.tensor([9.0, 2.0, 1.0, 4.0, 9.0], dtype=torch.double))
    around = centre.clamp(0, 1)
    found = learn(Quadratic.make(hessian, centre), GROUP, 10_000, around)
    assert [x in (0.0, 1.0) for x in found.mode] == [True, False, False, False, True]
    # Of the three that are left: their mean, and two directions off it.
    projection = torch.eye(3).double() - 1 / 3
    basis = torch.linalg.eigh(projection).eigenvectors[:, 1:]
    bends = torch.linalg.eigvalsh(basis.T @ hessian[1:4, 1:4] @ basis)
    assert found.adapted == pytest.approx(1 + (bends / (bends + found.strength)).sum().item())
    assert found.supported > found.adapted
    # At a corner of the cube nothing is left.
    corner = torch.tensor([-9.0, 9.0, -9.0, 9.0, 9.0], dtype=torch.double)
    assert learn(Quadratic.make(hessian, corner), GROUP, 10_000, corner.clamp(0, 1)).adapted == 0
    inside = learn(Quadratic.make(hessian, TARGET), GROUP, 10_000, TARGET)
    assert inside.adapted is None
    alone = learn(Quadratic.make(hessian, centre), (), 100, around)
    assert (alone.supported, alone.adapted) == (D, 3.0)


def test_a_regions_next_point_minimises_f_with_the_penalty() -> None:
    model, low, high = fitted(), torch.full((D,), 0.25).double(), torch.full((D,), 0.65).double()
    surface = Surface.of(model, "log_likelihood")
    for strength in (0.1, 2.0, 1000.0):
        penalty = GroupPenalty(GROUP, "log_likelihood", strength)
        found = minimise_in_box(model, low, high, [(low + high) / 2], 0.0, 0, penalty)
        reference = penalised_minimum(surface, GROUP, strength, low, high, (low + high) / 2)
        assert torch.allclose(found, reference, atol=2e-3)  # L-BFGS-B ends by changes of the merit
    assert off_mean(found, GROUP).abs().max() < 1e-3


def test_pending_points_keep_proposals_of_one_region_apart() -> None:
    model, low, high = fitted(), torch.zeros(D).double(), torch.ones(D).double()
    penalty = GroupPenalty(GROUP, "log_likelihood", 1.0)
    first, later = (minimise_in_box(model, low, high, [TARGET], beta, 0, penalty) for beta in (0.0, 1.0))
    assert (first - later).abs().max() > 1e-3


SHORT = 12
"""Cost of a search in which the penalty has begun to hold."""


def run(problem: Means, cost: float = 20, seed: int = 0, slots: int = 1, **settings: bool) -> BilevelOptimizer:
    optimizer = BilevelOptimizer(problem.space, Default(**settings), seed, slots)  # type: ignore[arg-type]
    search(problem, optimizer, cost)
    return optimizer


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_a_group_with_nothing_to_tell_apart_collapses(seed: int) -> None:
    problem = Means((0.4,) * 8, seed=seed)
    optimizer = run(problem)
    best, lowest = optimizer.method.incumbent(optimizer.state), optimizer.state.best
    assert best is not None and lowest is not None
    means = torch.tensor(best.unit)
    spread = (problem.z.mean(0) / 4).std()  # of the lowest F
    assert means.std() < 0.35 * spread
    truth = (problem.truth + 2) / 4
    assert (means - truth).norm() < 0.7 * (problem.z.mean(0) / 4 + 0.5 - truth).norm()


def test_a_group_with_much_to_tell_apart_keeps_its_freedom() -> None:
    problem = Means((-1.5, 1.5, 0.0, 1.0, -1.0, 0.5, -0.5, 1.2))
    optimizer = run(problem)
    best, lowest = optimizer.method.incumbent(optimizer.state), optimizer.state.best
    assert best is not None and lowest is not None
    assert best.upper_loss - lowest.upper_loss < 0.01 * (optimizer.state.trainings[0].upper_loss - lowest.upper_loss)
    shrinkage = optimizer.state.shrinkage
    assert shrinkage is not None and shrinkage.supported > 7


def proposals(optimizer: BilevelOptimizer) -> list[Proposal]:
    return [training.proposal for training in optimizer.state.trainings]


def test_switched_off_the_search_is_that_of_a_loss_that_is_no_likelihood() -> None:
    problem, plain = Means((0.4,) * 5), Means((0.4,) * 5)
    plain.upper_likelihood = "none"
    off = run(problem, SHORT, generalise=False)
    assert proposals(off) == proposals(run(plain, SHORT, generalise=False)) == proposals(run(plain, SHORT))
    assert proposals(off) != proposals(run(problem, SHORT))
    assert off.method.incumbent(off.state) is off.state.best
    # what the examples determine is said all the same
    assert off.state.shrinkage is not None and off.state.shrinkage.strength > 0


def test_a_loss_that_is_no_likelihood_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    problem = Means((0.4,) * 4)
    problem.upper_likelihood = "auto"  # the loss ends in a division
    say_once.cache_clear()
    run(problem, SHORT)
    assert [record.getMessage()[:25] for record in caplog.records if "generalise" in record.getMessage()] == [
        "Means: hyperparameters of"
    ]
    caplog.clear()
    problem = Means((0.4,) * 4)
    problem.upper_likelihood = "none"
    say_once.cache_clear()
    run(problem, SHORT)
    assert not any("generalise" in record.getMessage() for record in caplog.records)


def test_the_first_steps_are_plain() -> None:
    known = [step.shrinkage is not None for step in run(Means((0.4,) * 5), SHORT).state.steps]
    assert known == [False] * PLAIN_STEPS + [True] * (len(known) - PLAIN_STEPS)


def test_derivatives_are_known_where_the_model_holds_them() -> None:
    points = sobol_points(D, 20, 1)
    trainings, near = observed(valley, points), points[2]
    known = points[::2]

    def held(rows: int) -> list[list[float]]:
        return sorted(Surface.of(fit_upper_model(trainings, [], near, rows), "log_likelihood").differentiated.tolist())

    assert held(500) == sorted(known.tolist())
    nearest = (known - near).norm(dim=1).argsort()[:4]
    assert held(20 + 4 * D) == sorted(known[nearest].tolist())


def test_where_rows_run_out_the_evidence_is_that_of_a_model_around_the_result() -> None:
    problem = Means((0.4,) * 8)
    state = run(problem).state

    def learned(method: Default, centre: Training) -> Shrinkage | None:
        near = torch.tensor(centre.unit, dtype=torch.double)
        model = fit_upper_model(state.measured, [], near, method.max_rows, (), trust(promises(state)))
        return method._shrinkage(problem, problem.space, {}, state, model, centre.index)

    few = Default(max_rows=60)
    result = few.incumbent(state)
    assert result is not None
    x = torch.tensor(result.unit)
    other = max((t for t in state.done if t.hypergradient), key=lambda t: (torch.tensor(t.unit) - x).norm().item())
    assert learned(few, other) == learned(few, result) != learned(Default(), result)


@pytest.mark.slow
def test_a_searcher_gives_the_training_expected_to_be_best() -> None:
    class View(SearchView):
        def __init__(self, optimizer: BilevelOptimizer | None) -> None:
            self._optimizer, self._not_given = optimizer, None

    optimizer = run(Means((0.4,) * 8, seed=1))
    view = View(optimizer)
    assert view.best is not None and view.new_data is not None
    assert view.best == optimizer.method.incumbent(optimizer.state) != optimizer.state.best
    assert view.new_data == new_data(optimizer.state, view.best)
    assert view.new_data.in_words.startswith(f"F {view.best.upper_loss:.3g}, expected on new data about")
    with pytest.raises(SpaceError, match="no search space yet"):
        View(None).best  # noqa: B018
