from __future__ import annotations

import pytest
import torch
from torch import Tensor

from raybilevel._lower.lbfgs import Merit, curvature, inner, minimise, norm
from tests.problems_for_tests import vector

LINE_SEARCH = 25  # evaluations that one line search of torch's L-BFGS may take


def rosenbrock(variables: list[Tensor]) -> Merit:
    a, b = (v.clone().requires_grad_(True) for v in variables)
    value = (1 - a) ** 2 + 100 * (b - a**2) ** 2
    return value.item(), list(torch.autograd.grad(value, [a, b]))


def test_minimise_goes_down_to_its_tolerance():
    start = [vector(-1.2)[0], vector(1.0)[0]]
    found = minimise(rosenbrock, start, 200, 1e-6)
    assert max(g.abs().item() for g in rosenbrock(found)[1]) <= 1e-6
    assert [v.item() for v in found] == pytest.approx([1.0, 1.0], abs=1e-5)
    assert [v.item() for v in start] == [-1.2, 1.0]  # what it was given is left alone


def test_minimise_keeps_to_its_evaluations():
    calls = []

    def counted(variables: list[Tensor]) -> Merit:
        calls.append(variables)
        return rosenbrock(variables)

    minimise(counted, [vector(-1.2)[0], vector(1.0)[0]], 25, 1e-12)
    assert 25 <= len(calls) <= 30  # line searches on this function take a few evaluations; to the end it takes 50


def test_inner_product_and_norm_over_tensors_of_different_shapes():
    a, b = [vector(1.0, 2.0), torch.ones(2, 2, dtype=torch.double)], [vector(3.0, -1.0), torch.eye(2).double()]
    assert inner(a, b) == 3 - 2 + 2
    assert norm(a) == pytest.approx(3.0)


def test_curvature_of_a_quadratic_along_a_direction():
    hessian = torch.tensor([[2.0, 1.0], [1.0, 5.0]], dtype=torch.double)

    def merit(point: list[Tensor]) -> Merit:
        return (point[0] @ hessian @ point[0] / 2).item(), [hessian @ point[0]]

    at, along = [vector(0.3, -1.0)], [vector(1.0, 2.0)]
    exact = (along[0] @ hessian @ along[0] / (along[0] @ along[0])).item()
    assert curvature(merit, at, merit(at)[1], along, 1e-6) == pytest.approx(exact, rel=1e-6)
