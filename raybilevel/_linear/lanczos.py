"""A function of a symmetric matrix, times a vector, by products with the matrix alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from raybilevel.errors import NotFiniteError

Operator = Callable[[Tensor], Tensor]
Filter = Callable[[Tensor], Tensor]
"""phi of eigenvalues, shape (k,): shape (k,). It may depend on all of them."""


@dataclass(frozen=True)
class Filtered:
    """phi(A) b.

    vector:   shape (n,).
    residual: how much of the response to b the Krylov space leaves out, relative to |b| (see `filtered`).
    products: with A.
    values:   the Ritz values, ascending: eigenvalues of A as the Krylov space of b sees them, shape (products,).
    weights:  how much of b lies along each, shape (products,): <b, phi(A) b> = |b|^2 <weights, phi(values)>.
    """

    vector: Tensor
    residual: float
    products: int
    values: Tensor
    weights: Tensor


def filtered(operator: Operator, right: Tensor, phi: Filter, tolerance: float, limit: int) -> Filtered:
    """phi(A) b ~ |b| V phi(T) e_1, with V an orthonormal basis of the Krylov space of b and T = V^T A V (Lanczos).

    It ends where beta_k |e_k^T phi(T) e_1| <= tolerance: of phi(h) = 1 / (h + c) that is the residual of the system
    (A + c) q = b, relative to |b|. Every new vector is made orthogonal to all others, twice, so that no eigenvalue is
    seen two times (Parlett 1998, The Symmetric Eigenvalue Problem, section 6.9). It keeps `limit` vectors at most.

    operator: v, shape (n,) -> A v.
    right:    b, shape (n,), not 0.
    """
    size = right.norm().item()
    basis = [right / size]
    diagonal: list[float] = []
    beside: list[float] = []
    while True:
        image = operator(basis[-1])
        vectors = torch.stack(basis)  # (k, n)
        found = vectors @ image
        diagonal.append(found[-1].item())
        # Once leaves what rounding has put back of the other vectors, so it is done twice.
        image = image - vectors.T @ found
        image = image - vectors.T @ (vectors @ image)
        beta = image.norm().item()
        if not math.isfinite(beta):
            raise NotFiniteError("a product with the second derivatives of the lower-level loss is NaN or infinite")
        values, q = torch.linalg.eigh(tridiagonal(diagonal, beside))
        # T = Q diag(values) Q', so phi(T) e_1 = Q phi(values) Q' e_1, and Q' e_1 is the first row of Q.
        coefficients = q @ (phi(values) * q[0])
        residual = beta * abs(coefficients[-1].item())
        # The Krylov space is invariant then, and the next vector would be rounding, scaled up.
        exhausted = beta <= 1e-12 * values.abs().max().item()
        if residual <= tolerance or len(diagonal) >= limit or exhausted:
            vector = size * (vectors.T @ coefficients.to(vectors))
            return Filtered(vector, residual, len(diagonal), values, q[0].square())
        beside.append(beta)
        basis.append(image / beta)
        del vectors  # a copy of the basis, which would be there beside the next one


def tridiagonal(diagonal: list[float], beside: list[float]) -> Tensor:
    """The symmetric matrix with these numbers on and beside its diagonal, shape (k, k)."""
    # A small matrix: in double precision and on the CPU, whatever A and b are.
    off = torch.diag(torch.tensor(beside, dtype=torch.double), 1)
    return torch.diag(torch.tensor(diagonal, dtype=torch.double)) + off + off.T
