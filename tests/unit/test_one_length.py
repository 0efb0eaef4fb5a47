from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from raybilevel._models.gaussian_process import NUGGET, DerivativeGP, derivative_rows, relative, value_rows
from raybilevel._models.marginal_likelihood import MarginalLikelihood, Priors
from raybilevel._models.one_length import ROWS, Observed, OneLengthGP, OneLengthLikelihood, fit_one_length
from raybilevel.space import sobol_points
from tests.problems_for_tests import vector

D, COUNT, WHICH = 7, 4, (3, 0, 1)
AT = np.array([0.3, 0.2, math.log(0.9), -6.0, -4.0])


def bowl(x: Tensor) -> Tensor:
    return (x - 0.3).square().sum(-1) + torch.sin(2 * x).prod(-1)


def slopes(x: Tensor) -> dict[int, Tensor]:
    tracked = x.clone().requires_grad_(True)
    (found,) = torch.autograd.grad(bowl(tracked).sum(), tracked)
    return {i: found[i] for i in WHICH}


def both() -> tuple[OneLengthGP, DerivativeGP, Priors]:
    """The process, and the same by dense algebra of all rows."""
    x = sobol_points(D, COUNT, 1)
    gradients, values = slopes(x), bowl(x)
    weights = relative(gradients)
    rows = [derivative_rows(x[i], None, w) for i, w in weights.items()]
    targets = torch.cat([values, *(w * gradients[i] for i, w in weights.items())])
    dense = DerivativeGP(torch.cat([value_rows(x), *rows]), targets, D)
    dense.hyperparameters = np.concatenate([AT[:2], np.full(D, AT[2]), AT[3:]])
    priors = Priors(*(column[[0, 1, -2, -1]] for column in dense.priors))
    stacked = torch.stack(list(gradients.values()))
    observed = Observed(x, values, torch.tensor(WHICH), stacked, vector(*weights.values()))
    return OneLengthGP(observed, AT, priors), dense, priors


def test_the_likelihood_is_that_of_all_rows():
    model, dense, priors = both()
    value, gradient = OneLengthLikelihood(model.observed, priors)(AT)
    expected, theirs = MarginalLikelihood(dense.train_inputs[0], dense.train_targets, (), priors, NUGGET)(AT)
    assert model.observed.free == D - (COUNT - 1)
    assert value == pytest.approx(expected, rel=1e-9)
    assert gradient.tolist() == pytest.approx(theirs.tolist(), abs=1e-8)


def test_the_likelihood_has_every_value_however_many_derivatives_there_are():
    x = sobol_points(60, 30, 1)
    gradients = torch.randn(30, 60, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    observed = Observed(x, bowl(x), torch.arange(30), gradients, torch.ones(30, dtype=torch.double))
    found = OneLengthLikelihood(observed, both()[2]).inside
    assert len(found.targets) == ROWS and found.values == 30
    assert torch.equal(found.targets[:30], observed.values)


def test_values_have_no_more_noise_than_without_derivatives():
    # Values along a line, whose bend is in one direction of 120. In the others the derivatives are those of a plane.
    d, count = 120, 9
    generator = torch.Generator().manual_seed(0)
    slope, *errors = torch.randn(count + 1, d, dtype=torch.double, generator=generator) / math.sqrt(d)
    along = torch.linspace(0, -0.5, count, dtype=torch.double)
    values = along * slope.square().sum() + 0.3 * torch.cos(9 * along)
    x = 0.5 + along.unsqueeze(1) * slope
    found = fit_one_length(x, values, {i: slope + 0.1 * error for i, error in enumerate(errors)})
    assert isinstance(found.model, OneLengthGP) and found.model.value_noise < 1e-3
    assert torch.stack([found.mean(point) for point in x]).tolist() == pytest.approx(values.tolist(), abs=0.05)


@pytest.mark.parametrize("pending", [False, True])
def test_the_posterior_is_that_of_all_rows(pending: bool):
    model, dense, _ = both()
    if pending:
        more = sobol_points(D, 3, 9)[1:]
        for one in (model, dense):
            one.observe(more, vector(0.1, 0.4))
    x = sobol_points(D, 6, 5).reshape(2, 3, D)
    for found, expected in zip(model.conditioned.moments(x), dense.conditioned.moments(x), strict=True):
        # The condition number is some 1e6.
        assert torch.allclose(found, expected, rtol=0, atol=1e-8)
    assert torch.allclose(model.conditioned.means(x), dense.conditioned.means(x), rtol=0, atol=1e-8)
    posterior = model.posterior(x)
    assert torch.equal(posterior.mean[..., 0], model.conditioned.means(x))
    assert (model.value_noise, model.lengths.tolist()) == (
        pytest.approx(dense.value_noise),
        pytest.approx(dense.lengths.tolist()),
    )


def test_the_weights_of_points_are_those_of_all_rows():
    model, dense, _ = both()
    (values, slopes), (theirs, others) = model.conditioned.by_point, dense.conditioned.by_point
    order = [int((dense.conditioned.points == point).all(1).nonzero()) for point in model.conditioned.points]
    assert torch.allclose(values, theirs[order], rtol=0, atol=1e-6)
    assert torch.allclose(slopes, others[order], rtol=0, atol=1e-6)


def test_it_learns_a_function_of_many_coordinates_from_few_gradients():
    d = 300
    x = sobol_points(d, 8, 1)
    weights = torch.linspace(0.0, 1.0, d, dtype=torch.double)
    found = fit_one_length(x, x.square() @ weights, {i: 2 * weights * x[i] for i in range(8)})
    there = 0.5 * x[0] + 0.5 * x[3]
    expected = (there.square() @ weights).item()
    spread = (x.square() @ weights).std().item()
    assert found.mean(there).item() == pytest.approx(expected, abs=0.5 * spread)
    tracked = x[2].clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(found.mean(tracked), tracked)
    assert torch.nn.functional.cosine_similarity(slope, 2 * weights * x[2], dim=0) > 0.99


def test_one_point_is_enough():
    x, slope = torch.full((1, 150), 0.4, dtype=torch.double), torch.linspace(-1, 1, 150, dtype=torch.double)
    found = fit_one_length(x, vector(2.0), {0: slope})
    assert found.mean(x[0]).item() == pytest.approx(2.0, abs=1e-2)
    tracked = x[0].clone().requires_grad_(True)
    (expected,) = torch.autograd.grad(found.mean(tracked), tracked)
    assert torch.allclose(expected, slope, rtol=0, atol=0.05)
