from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from raybilevel._models.feasibility import Feasibility, classified, fit_feasibility
from raybilevel.methods._default import farthest
from raybilevel.search_state import Proposal, Status, Training
from raybilevel.space import sobol_points
from tests.problems_for_tests import vector


def trainings(points: Tensor, fails: float = 0.4) -> list[Training]:
    """Those whose first coordinate is below a bound failed."""
    made = []
    for i, unit in enumerate(points.tolist()):
        status: Status = "failed" if unit[0] < fails else "done"
        made.append(Training(i, Proposal(tuple(unit), "start"), status, i, upper_loss=1.0))
    return made


def found(count: int = 12) -> Feasibility:
    feasibility = fit_feasibility(trainings(sobol_points(2, count, 1)), vector(0.5, 0.5))
    assert feasibility is not None
    return feasibility


def test_without_failures_there_is_nothing_to_model():
    assert fit_feasibility(trainings(sobol_points(2, 5, 1), fails=0.0), vector(0.5, 0.5)) is None


def test_one_failure_does_not_fence_off_the_box():
    points = sobol_points(2, 4, 1)
    lowest = points[:, 0].min().item()
    feasibility = fit_feasibility(trainings(points, fails=lowest + 1e-6), vector(0.5, 0.5))
    assert feasibility is not None
    assert feasibility.log_probability(sobol_points(2, 64, 2)).exp().median() > 0.3


def test_the_side_that_fails_is_told_from_the_other():
    inside, outside = (found().log_probability(vector(x, 0.5)).exp().item() for x in (0.9, 0.1))
    assert inside > 0.6
    assert outside < 0.2


def test_the_mode_is_stationary_and_the_deviation_is_that_of_dense_algebra():
    points, succeeded = sobol_points(2, 6, 1), torch.tensor([True, False, True, True, False, True])
    fitted = classified(points, succeeded, deviation=3.0, length=0.5)
    covariance = 9 * torch.exp(-torch.cdist(points, points).square() / (2 * 0.5**2))
    latent = fitted.constant + covariance @ fitted.residuals
    p = torch.sigmoid(latent)
    assert fitted.constant == pytest.approx(math.log(5 / 3))
    assert fitted.residuals.tolist() == pytest.approx((succeeded.double() - p).tolist(), abs=1e-7)
    posterior = torch.linalg.inv(torch.linalg.inv(covariance) + torch.diag(p * (1 - p)))
    expected = torch.sigmoid(latent - posterior.diagonal().sqrt())
    assert fitted.log_probability(points).exp().tolist() == pytest.approx(expected.tolist(), abs=1e-6)


def test_the_probability_is_differentiable():
    x = sobol_points(2, 3, 5).requires_grad_(True)
    torch.autograd.gradcheck(found().log_probability, x)


def test_points_that_would_fail_are_not_filled():
    points = sobol_points(2, 12, 1)
    succeeded = points[points[:, 0] >= 0.4]
    assert farthest(succeeded, 0, found())[0] > 0.4 > farthest(succeeded, 0)[0]
