"""Functions of a matrix by Lanczos, against its eigenvalues."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from raybilevel._linear.lanczos import filtered

EVERY = 20


def matrix(values: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.double))
    return basis * values @ basis.T


def right(size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(1), dtype=torch.double)


def test_a_whole_krylov_space_gives_the_function_of_the_matrix() -> None:
    values = torch.linspace(-1, 3, EVERY, dtype=torch.double)
    a, b = matrix(values), right(EVERY)
    found = filtered(lambda v: a @ v, b, torch.sin, 0.0, EVERY)
    torch.testing.assert_close(found.vector, matrix(values.sin()) @ b, rtol=0, atol=1e-10)
    torch.testing.assert_close(found.values, values, rtol=0, atol=1e-10)
    assert found.products == EVERY


def test_its_residual_is_that_of_the_linear_system() -> None:
    a, b = matrix(torch.logspace(-3, 1, EVERY, dtype=torch.double)), right(EVERY)
    found = filtered(lambda v: a @ v, b, lambda h: 1 / (h + 0.1), 0.2, EVERY)
    true = (b - a @ found.vector - 0.1 * found.vector).norm() / b.norm()
    assert found.residual == pytest.approx(true.item(), rel=1e-8)
    assert found.residual <= 0.2 and 1 < found.products < EVERY


@pytest.mark.parametrize("limit", [1, 3])
def test_it_keeps_to_its_products(limit: int) -> None:
    asked: list[Tensor] = []

    def operator(v: Tensor) -> Tensor:
        asked.append(v)
        return a @ v

    a, b = matrix(torch.linspace(1, 9, EVERY, dtype=torch.double)), right(EVERY)
    assert filtered(operator, b, torch.reciprocal, 0.0, limit).products == len(asked) == limit


def test_it_ends_with_the_krylov_space() -> None:
    a = matrix(torch.cat([torch.ones(EVERY // 2), 2 * torch.ones(EVERY // 2)]).double())
    found = filtered(lambda v: a @ v, right(EVERY), torch.reciprocal, 0.0, EVERY)
    assert found.products == 2
    torch.testing.assert_close(a @ found.vector, right(EVERY), rtol=0, atol=1e-12)


def test_no_eigenvalue_is_seen_two_times() -> None:
    # without reorthogonalisation the largest of these is found again and again
    values = torch.cat([torch.logspace(-6, 0, 99), torch.tensor([100.0])]).double()
    a = matrix(values)
    found = filtered(lambda v: a @ v, right(100), torch.reciprocal, 0.0, 60)
    assert (found.values > 50).sum() == 1
