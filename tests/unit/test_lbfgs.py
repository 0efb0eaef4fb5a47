from __future__ import annotations

import pytest
import torch
from torch import Tensor

from raybilevel._lower.lbfgs import curvature, minimise
from raybilevel._lower.linearisation import inner, norm
from tests.problems_for_tests import vector

LINE_SEARCH = 25  # evaluations that one line search of torch's L-BFGS may take


def rosenbrock(point: Tensor) -> tuple[float, Tensor]:
    point = point.clone().requires_grad_(True)
    a, b = point
    value = (1 - a) ** 2 + 100 * (b - a**2) ** 2
    return value.item(), torch.autograd.grad(value, point)[0]


def test_minimise_goes_down_to_its_tolerance():
    start = vector(-1.2, 1.0)
    found = minimise(rosenbrock, start, 200, 1e-6)
    assert rosenbrock(found.at)[1].abs().max().item() <= 1e-6
    assert found.at.tolist() == pytest.approx([1.0, 1.0], abs=1e-5)
    assert start.tolist() == [-1.2, 1.0]  # what it was given is left alone


def test_minimise_keeps_to_its_evaluations():
    calls = []

    def counted(point: Tensor) -> tuple[float, Tensor]:
        calls.append(point)
        return rosenbrock(point)

    minimise(counted, vector(-1.2, 1.0), 25, 1e-12)
    assert 25 <= len(calls) <= 30  # line searches on this function take a few evaluations; to the end it takes 50


def test_inner_products_of_single_precision_are_summed_in_double():
    a, b = torch.tensor([1.0, 1e6, -1e6]), torch.tensor([1.0, 1e6, 1e6])
    assert inner(a, b) == 1.0  # of 1e12, single precision has seven digits
    assert norm(torch.tensor([1.0, 2.0, 2.0])) == 3.0


def test_curvature_of_a_quadratic_along_a_direction():
    hessian = torch.tensor([[2.0, 1.0], [1.0, 5.0]], dtype=torch.double)

    def merit(point: Tensor) -> tuple[float, Tensor]:
        return (point @ hessian @ point / 2).item(), hessian @ point

    at, along = vector(0.3, -1.0), vector(1.0, 2.0)
    exact = (along @ hessian @ along / (along @ along)).item()
    assert curvature(merit, at, merit(at)[1], along, 1e-6) == pytest.approx(exact, rel=1e-6)
