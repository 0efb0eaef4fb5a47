from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from raybilevel._models.acquisition import (
    FEWEST_GRADIENTS,
    MOST_POINTS,
    UpperModel,
    Warp,
    expected_improvement,
    fit_upper_model,
    minimise_in_box,
)
from raybilevel._models.one_length import OneLengthGP
from raybilevel._models.value_function import thinned
from raybilevel.search_state import Proposal, Training
from raybilevel.space import sobol_points
from tests.problems_for_tests import vector


def bowl(x: Tensor) -> Tensor:
    """F of x, shape (n, d) -> (n,): lowest at 0.3."""
    return 1 + (x - 0.3).square().sum(-1)


def trained(x: Tensor, gradients: bool = True) -> list[Training]:
    made = []
    for i, (unit, upper) in enumerate(zip(x, bowl(x).tolist(), strict=True)):
        slope = tuple((2 * (unit - 0.3)).tolist()) if gradients else None
        proposal = Proposal(tuple(unit.tolist()), "start")
        made.append(Training(i, proposal, "done", i, upper_loss=upper, hypergradient=slope))
    return made


def model_of(d: int, count: int, gradients: bool = True, pending: tuple[Tensor, ...] = ()) -> UpperModel:
    return fit_upper_model(trained(sobol_points(d, count, 1), gradients), pending, torch.full((d,), 0.5), 500)


def moments(model: UpperModel, points: Tensor) -> tuple[Tensor, Tensor]:
    """Posterior mean and deviation of warped, standardised F, shape (n, d) -> (n,) each."""
    with torch.no_grad():
        posterior = model.process.model.posterior(points.unsqueeze(1))
        return posterior.mean.flatten(), posterior.variance.flatten().sqrt()


def grid(d: int) -> Tensor:
    return torch.cartesian_prod(*[torch.linspace(0, 1, 201 if d == 1 else 41, dtype=torch.double)] * d).reshape(-1, d)


# The warp.


def test_the_warp_by_hand():
    warp = Warp.of(vector(5.0, 2.0, 3.0))  # low 2, median 3
    assert warp == Warp(2.0, 1.0)
    assert warp(vector(2.0, 3.0, 5.0)).tolist() == pytest.approx([0.0, math.log(2), math.log(4)], rel=1e-15)
    assert warp.slope(vector(2.0, 3.0)).tolist() == [1.0, 0.5]


def test_the_warps_inverse_and_slope():
    upper = vector(0.3, 0.31, 1.7, 40.0)
    warp = Warp.of(upper)
    for value in upper:
        assert warp.inverse(warp(value).item()) == pytest.approx(value.item(), rel=1e-12)
        h = 1e-6 * value.item()
        difference = (warp(value + h) - warp(value - h)).item() / (2 * h)
        assert warp.slope(value).item() == pytest.approx(difference, rel=1e-7)  # (h / F)^2 and 1e-16 / 1e-6


@pytest.mark.parametrize(
    ("upper", "steepest", "spread"),
    [([2.0], 0.0, 1.0), ([2.0] * 3, 0.5, 0.5), ([2.0, 2.0 + 1e-15], 0.5, 0.5), ([2.0, 2.0, 9.0], 0.5, 7 / 3)],
)
def test_without_a_spread_of_the_median_the_warp_is_still_a_logarithm(upper, steepest, spread):
    warp = Warp.of(vector(*upper), steepest)
    assert (warp.low, warp.spread) == (2.0, pytest.approx(spread))


@pytest.mark.parametrize("scale", [1e-14, 1000])
def test_shift_and_scale_of_f_leave_the_warp_alone_but_for_a_constant(scale: float):
    upper = vector(0.3, 0.5, 1.7, 40.0)
    a, b = (Warp.of(u)(u) for u in (upper, scale * (upper - 7)))
    assert (b - a).tolist() == pytest.approx([math.log(scale)] * 4, rel=1e-12)


# The model.


@pytest.mark.parametrize("gradients", [False, True])
def test_the_model_gives_f_back_in_its_own_units(gradients: bool):
    x, model = sobol_points(2, 8, 1), model_of(2, 8, gradients)
    for point, upper in zip(x, bowl(x), strict=True):
        assert model.mean(point) == pytest.approx(upper.item(), abs=1e-2)  # F spreads over 1 to 1.9


@pytest.mark.parametrize("count", [6, 8])
def test_hypergradients_make_it_better(count: int):
    points = sobol_points(2, 30, 9)
    errors = []
    for gradients in (False, True):
        model = model_of(2, count, gradients)
        found = vector(*(model.mean(p) for p in points))
        errors.append((found - bowl(points)).abs().median().item())  # corners are extrapolated, badly by both
    assert errors[1] < 0.5 * errors[0]


def test_rows_run_out_for_the_hypergradients_that_are_far():
    near = vector(0.9, 0.9)
    trainings = trained(sobol_points(2, 12, 1))
    model = fit_upper_model(trainings, (), near, 2 * FEWEST_GRADIENTS)
    # At most half of the rows are values.
    values = FEWEST_GRADIENTS
    kept = {tuple(row) for row in model.process.model.train_inputs[0][values:, :2].tolist()}
    closest = sorted(thinned(trainings, near, values), key=lambda t: sum((a - 0.9) ** 2 for a in t.unit))
    closest = closest[: FEWEST_GRADIENTS // 2]
    assert kept == {t.unit for t in closest}


def test_many_observations_leave_room_for_hypergradients_and_for_the_best():
    trainings = trained(sobol_points(2, 60, 1))
    model = fit_upper_model(trainings, (), vector(0.9, 0.9), 40)
    assert len(model.process.model.train_inputs[0]) == 20 + 10 * 2
    z = (
        model.warp(torch.tensor(min(t.upper_loss for t in trainings), dtype=torch.double)).item() - model.process.shift
    ) / model.process.scale
    assert model.best == pytest.approx(z, rel=1e-6)


def test_without_hypergradients_all_rows_are_values():
    model = fit_upper_model(trained(sobol_points(2, 60, 1), gradients=False), (), vector(0.9, 0.9), 50)
    assert len(model.process.model.train_inputs[0]) == 50


@pytest.mark.parametrize(("sign", "kept"), [(1, True), (-1, False)])
def test_hypergradients_that_contradict_values_are_left_out(sign: int, kept: bool):
    d = 3
    trainings = [
        replace(t, hypergradient=tuple(sign * g for g in t.hypergradient or ()))
        for t in trained(sobol_points(d, 10, 1))
    ]
    model = fit_upper_model(trainings, (), torch.full((d,), 0.5), 500)
    assert len(model.process.model.train_inputs[0]) == (10 * (1 + d) if kept else 10)


def test_hypergradients_are_multiplied_by_the_trust_in_them():
    near = torch.full((2,), 0.5)
    whole, half = (fit_upper_model(trained(sobol_points(2, 4, 1)), (), near, 500, trust=trust) for trust in (1.0, 0.5))
    assert (half.process.model.train_targets[4:] * 2).tolist() == pytest.approx(
        whole.process.model.train_targets[4:].tolist()
    )
    assert (
        len(fit_upper_model(trained(sobol_points(2, 4, 1)), (), near, 500, trust=0.0).process.model.train_targets) == 4
    )


def test_the_lowest_means_and_the_lowest_value():
    trainings = trained(sobol_points(2, 20, 1), gradients=False)
    lucky = max(range(20), key=lambda i: trainings[i].upper_loss)
    trainings[lucky] = replace(trainings[lucky], upper_loss=0.99)
    model = fit_upper_model(trainings, (), torch.full((2,), 0.5), 500)
    found = dict(model.lowest(trainings))
    assert lucky in found and len(found) in (8, 9)
    means = {i: model.mean(vector(*t.unit)) for i, t in enumerate(trainings)}
    assert set(sorted(means, key=means.__getitem__)[:8]) <= set(found)
    assert [found[i] for i in found] == pytest.approx([means[i] for i in found], abs=1e-5)  # as of the condition
    assert 0 < model.gain(vector(*trainings[lucky].unit)) < 1


def test_a_pending_point_is_believed_at_its_mean():
    pending = (vector(0.9, 0.1), vector(0.7, 0.7))
    without, believing = model_of(2, 6, False), model_of(2, 6, False, pending)
    points = torch.cat([torch.stack(pending), sobol_points(2, 10, 5)])
    means, deviations = zip(moments(without, points), moments(believing, points), strict=True)
    # an observation at the mean changes no mean, but for rounding times the condition number
    assert means[1].tolist() == pytest.approx(means[0].tolist(), abs=1e-6)
    assert all(deviations[1][:2] < 0.1 * deviations[0][:2])
    assert all(deviations[1] <= deviations[0] + 1e-9)


def test_the_incumbent_is_the_lowest_warped_f():
    model, x = model_of(2, 8), sobol_points(2, 8, 1)
    z = (model.warp(bowl(x).min()).item() - model.process.shift) / model.process.scale
    assert model.best == pytest.approx(z, rel=1e-12)


# Where to train next.


@pytest.mark.parametrize("beta", [0.0, 1.0])
@pytest.mark.parametrize(
    ("low", "high"), [((0.0, 0.0), (1.0, 1.0)), ((0.5, 0.6), (0.7, 0.65)), ((0.0, 0.2), (0.1, 0.9))]
)
def test_minimise_in_box(low: tuple[float, ...], high: tuple[float, ...], beta: float):
    model, bottom, top = model_of(2, 6), vector(*low), vector(*high)
    starts = [vector(0.2, 0.2), vector(0.65, 0.62)]
    found = minimise_in_box(model, bottom, top, starts, beta, seed=0)

    def bound(points: Tensor) -> Tensor:
        mean, deviation = moments(model, points)
        return mean - math.sqrt(beta) * deviation

    assert bool(((found >= bottom) & (found <= top)).all())
    inside = torch.stack([start.clamp(bottom, top) for start in starts])
    everywhere = bottom + grid(2) * (top - bottom)
    # as good as its starts and as a grid, to the optimiser's tolerance
    assert bound(found.unsqueeze(0)).item() <= torch.cat([bound(inside), bound(everywhere)]).min().item() + 1e-4


def test_minimise_in_box_finds_the_bottom_of_the_bowl():
    found = minimise_in_box(model_of(2, 6), vector(0, 0), vector(1, 1), [], 0.0, seed=0)
    assert found.tolist() == pytest.approx([0.3, 0.3], abs=0.03)  # six points and their gradients know it to some 0.01


def closed_form_ei(model: UpperModel, points: Tensor) -> Tensor:
    """(best - mean) Phi(u) + deviation phi(u), u = (best - mean) / deviation."""
    mean, deviation = moments(model, points)
    u = (model.best - mean) / deviation
    return (model.best - mean) * (1 + torch.erf(u / math.sqrt(2))) / 2 + deviation * torch.exp(-u.square() / 2) / (
        math.sqrt(2 * math.pi)
    )


def test_expected_improvement_is_the_best_of_a_grid():
    x = vector(0.0, 0.35, 0.8, 1.0).unsqueeze(1)
    model = fit_upper_model(trained(x, gradients=False), (), vector(0.5), 500)
    found = expected_improvement(model, 1, [], seed=0)
    points = grid(1)
    best = closed_form_ei(model, points)
    assert closed_form_ei(model, found.unsqueeze(0)).item() >= 0.999 * best.max().item()
    # EI is flat at the top: the grid's step is 0.005
    assert found.item() == pytest.approx(points[best.argmax()].item(), abs=0.01)


def test_equal_calls_give_equal_points():
    model = model_of(2, 6)
    first = expected_improvement(model, 2, [], seed=3)
    torch.manual_seed(99)
    assert torch.equal(first, expected_improvement(model, 2, [], seed=3))


# In many dimensions.


def many(count: int, d: int = 120) -> list[Training]:
    """As of a search that has come near to one point."""
    return trained(0.4 + 0.2 * sobol_points(d, count, 1))


def test_with_room_for_few_gradients_one_length_scale_has_all_of_the_nearest_points():
    near = torch.full((120,), 0.5, dtype=torch.double)
    few = fit_upper_model(many(6), (vector(*[0.4] * 120),), near, 500)
    assert isinstance(few.process.model, OneLengthGP)
    assert len(few.process.model.observed.which) == 6 and len(few.process.model.observed.points) == 7
    assert 0 < few.gain(near) < 1
    some = fit_upper_model(many(MOST_POINTS + 5), (), near, 500)
    assert len(some.process.model.observed.points) == MOST_POINTS
    assert not isinstance(fit_upper_model(many(6), (), near, 120 * FEWEST_GRADIENTS).process.model, OneLengthGP)


@pytest.mark.parametrize("partial", [False, True])
def test_without_whole_gradients_one_length_scale_is_not_for_it(partial: bool):
    trainings = [
        replace(t, hypergradient=(math.nan, *(t.hypergradient or ())[1:]) if partial else None) for t in many(6)
    ]
    model = fit_upper_model(trainings, (), torch.full((120,), 0.5, dtype=torch.double), 500)
    assert not isinstance(model.process.model, OneLengthGP)


def test_a_region_step_in_many_dimensions_goes_to_the_optimum():
    centre = torch.full((120,), 0.5, dtype=torch.double)
    model = fit_upper_model(many(6), (), centre, 500)
    found = minimise_in_box(model, centre - 0.2, centre + 0.2, [centre], 0.0, 0)
    # F is lowest at 0.3.
    assert bowl(found) - 1 < 0.1 * (bowl(centre) - 1)
