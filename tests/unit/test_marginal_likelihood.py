from __future__ import annotations

import math

import gpytorch
import numpy as np
import pytest
import torch
from torch import Tensor

from raybilevel._models.gaussian_process import (
    NUGGET,
    DerivativeGP,
    derivative_rows,
    relative,
    spaced,
    value_rows,
)
from raybilevel._models.marginal_likelihood import MarginalLikelihood, factorised, features
from raybilevel.space import sobol_points
from tests.problems_for_tests import vector


def observed(d: int, count: int, gradients: int, choices: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Rows and targets of a sum of sines, with choices of three values."""
    x = sobol_points(d, count, 1)
    x[:, choices] = (3 * x[:, choices]).floor() / 2
    slopes = 3 * torch.cos(3 * x[:gradients])
    slopes[:, choices] = math.nan
    weights = relative(dict(enumerate(slopes)))
    rows = [derivative_rows(x[i], slope, weights[i]) for i, slope in enumerate(slopes)]
    known = [weights[i] * slope[~slope.isnan()] for i, slope in enumerate(slopes)]
    return torch.cat([value_rows(x), *rows]), torch.cat([torch.sin(3 * x).sum(1), *known])


@pytest.mark.parametrize(
    ("d", "count", "gradients", "choices", "most"),
    [(1, 5, 2, (), 99), (3, 9, 5, (), 99), (3, 9, 5, (1,), 99), (3, 9, 9, (), 20), (4, 12, 0, (0, 2), 99)],
)
def test_value_and_gradient_are_gpytorchs(d: int, count: int, gradients: int, choices: tuple[int, ...], most: int):
    rows, targets = observed(d, count, gradients, choices)
    chosen = spaced(rows[:, -d:].sign(), most)
    rows, targets = rows[chosen], targets[chosen]
    model = DerivativeGP(rows, targets, d, choices)
    # The lengths differ, so that the shortest, which decides the nugget, is one.
    at = np.concatenate([[0.3, 0.2], np.log(0.4 + 0.1 * np.arange(d)), [-6.0, -4.0]])
    model.hyperparameters = at
    value, gradient = MarginalLikelihood(rows, targets, choices, model.priors, NUGGET)(at)
    raw = [parameter.requires_grad_(True) for parameter in model._raw]
    marginal = gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model.train())
    expected = -marginal(model(rows), targets, rows)
    theirs = torch.autograd.grad(expected, raw, allow_unused=True)
    parts = [torch.zeros_like(p) if g is None else g for p, g in zip(raw, theirs, strict=True)]
    # Both divide the sum by the number of rows. gpytorch adds a jitter of 1e-8 to the lengths' prior.
    assert value == pytest.approx(expected.item(), abs=1e-6)
    assert gradient.tolist() == pytest.approx(torch.cat([p.flatten() for p in parts]).tolist(), abs=1e-6)


def test_a_descent_ends_where_the_gradient_is_small():
    rows, targets = observed(3, 9, 5, ())
    model = DerivativeGP(rows, targets, 3)
    marginal = MarginalLikelihood(rows, targets, (), model.priors, NUGGET)
    start = marginal(model.hyperparameters)
    value, at = marginal.descend(model.hyperparameters, model.bounds, 50)
    there, gradient = marginal(at)
    assert value == there < start[0]
    inside = (at > model.bounds.lb) & (at < model.bounds.ub)
    assert np.abs(gradient[inside]).max() < 0.02 * np.abs(start[1]).max()


def test_different_choices_are_at_distance_one():
    found, owner = features(vector(0.1, 0.0, 0.4, 0.5, 0.4, 1.0).reshape(3, 2), (1,))
    assert owner.tolist() == [0, 1, 1, 1]
    apart = torch.cdist(found[:, 1:], found[:, 1:])
    assert torch.allclose(apart, 1 - torch.eye(3, dtype=torch.double))
    assert found[:, 0].tolist() == [0.1, 0.4, 0.4]


def test_a_covariance_that_is_singular_by_rounding_gets_a_jitter():
    covariance = torch.ones(3, 3, dtype=torch.double) - 1e-10 * torch.eye(3, dtype=torch.double)
    factor = factorised(covariance, torch.zeros(3, dtype=torch.double))
    assert torch.allclose(factor @ factor.T, covariance, rtol=0, atol=1e-8)
    with pytest.raises(torch.linalg.LinAlgError):
        factorised(-covariance, torch.zeros(3, dtype=torch.double))
