"""Directions that one linear system recycles for the next: Ritz, harmonic Ritz, Ritz generalized singular vectors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from raybilevel.errors import ConfigError

Strategy = Literal["ritz", "harmonic_ritz", "ritz_generalized_singular"]
End = Literal["smallest", "largest", "mixed"]


@dataclass(frozen=True)
class ErrorEstimator:
    """Estimates |J H^-1 r| from an earlier system (Ehrhardt, Gazzola & Scott, arXiv:2412.08264).

    On the span of an orthonormal W, J H^-1 is about J W (W^T H W)^-1 W^T = P S Q^T W^T. Outside it the norm of J H^-1
    is taken to be `rest`. The paper has no such second term. Without it a residual outside W would count as no error.

    weighted: S Q^T W^T, shape (k, n).
    basis:    W, shape (n, m).
    rest:     the norm of S Q^T W^T on the part of W that the system before did not have. It measures how large J H^-1
        turned out to be on new directions. In the first system it is the largest generalized singular value.
    """

    weighted: Tensor
    basis: Tensor
    rest: float

    def norm(self, residual: Tensor) -> float:
        """The estimate at a residual, shape (n,)."""
        outside = residual - self.basis @ (self.basis.T @ residual)
        return float(torch.hypot((self.weighted @ residual).norm(), self.rest * outside.norm()))


@dataclass(frozen=True)
class RecycleSpace:
    """The recycled subspace.

    vectors:   U, shape (n, k).
    estimator: of the error of J q; None for strategies that do not use J.
    """

    vectors: Tensor
    estimator: ErrorEstimator | None = None


@dataclass(frozen=True)
class Selection:
    """Chooses the recycled subspace from W = [U, V], the recycled vectors and the Krylov basis of one solve.

    strategy: "ritz": eigenvectors of W^T H W. "harmonic_ritz": of (H W)^T H W z = theta W^T H W z.
        "ritz_generalized_singular": right generalized singular vectors of the pair (J W, W^T H W). They take the
        Jacobian into account that multiplies the solution.
    end: which values to keep. The "smallest" Ritz values are those that slow MINRES down. The "largest" generalized
        singular values matter most for J q. "mixed" is half of each.
    dimension:    number of vectors to keep.
    most_vectors: Krylov vectors that a solve stores at most, each with its product with H.
    """

    strategy: Strategy = "ritz"
    end: End = "smallest"
    dimension: int = 20
    most_vectors: int = 100

    def __post_init__(self) -> None:
        if self.strategy not in get_args(Strategy):
            raise ConfigError(f"unknown strategy {self.strategy!r}; choose one of {', '.join(get_args(Strategy))}")
        if self.end not in get_args(End):
            raise ConfigError(f"unknown end {self.end!r}; choose one of {', '.join(get_args(End))}")
        if self.dimension < 1 or self.most_vectors < 1:
            raise ConfigError(f"expected positive sizes, got {self.dimension} and {self.most_vectors}")

    @property
    def estimates_error(self) -> bool:
        return self.strategy == "ritz_generalized_singular"

    def select(
        self, w: Tensor, hw: Tensor, jacobian: Callable[[Tensor], Tensor], earlier: ErrorEstimator | None = None
    ) -> tuple[RecycleSpace | None, int]:
        """The recycled space from W and H W, both (n, m), and the number of products with J.

        The space is None if H annihilates the span of W.

        earlier: estimator of the system before.
        """
        # An orthonormal basis without directions that are numerically dependent. The columns are scaled first, so that
        # the rank is about the angles between them and not about their lengths.
        sizes = w.norm(dim=0)
        w, hw = w / sizes, hw / sizes
        left, values, right = torch.linalg.svd(w, full_matrices=False)
        rank = int((values > dependent(w.dtype) * values[0]).sum())
        w = left[:, :rank]
        hw = hw @ (right[:rank].T / values[:rank])  # H times the new basis, without new products
        projected = w.T @ hw  # (rank, rank)
        projected = (projected + projected.T) / 2  # symmetric up to rounding; eigh would read one triangle
        if self.strategy == "ritz_generalized_singular":
            return self._generalized_singular(w, projected, jacobian, earlier)
        if self.strategy == "ritz":
            _, vectors = torch.linalg.eigh(projected)
        else:
            # W^T H W z = (1 / theta) (H W)^T H W z for a harmonic Ritz value theta. The singular value decomposition of
            # H W gives a Z with H W Z orthonormal, without the null space of H: an ordinary eigenproblem.
            _, values, right = torch.linalg.svd(hw, full_matrices=False)
            kept = values > 10 * torch.finfo(hw.dtype).eps * values[0]
            if not kept.any():
                return None, 0
            # Not from the Gram matrix (H W)^T H W, whose condition number is the square of that of H W.
            z = right[kept].T / values[kept]
            reciprocal, found = torch.linalg.eigh(z.T @ projected @ z)
            vectors = z @ found[:, (1 / reciprocal).argsort()]
        return RecycleSpace(w @ self._choose(vectors)), 0

    def _generalized_singular(
        self,
        w: Tensor,
        projected: Tensor,
        jacobian: Callable[[Tensor], Tensor],
        earlier: ErrorEstimator | None,
    ) -> tuple[RecycleSpace | None, int]:
        """The generalized singular value decomposition of (J W, W^T H W).

        If W^T H W is invertible, it is the singular value decomposition P S Q^T of the quotient J W (W^T H W)^-1. The
        left vectors are Q, the right ones (W^T H W)^-1 Q. If W^T H W is singular, W is first reduced to the part where
        it is not.
        """
        values, vectors = torch.linalg.eigh(projected)
        regular = values.abs() > 10 * torch.finfo(w.dtype).eps * values.abs().max()
        if not regular.any():
            return None, 0
        if not regular.all():
            w, projected = w @ vectors[:, regular], torch.diag(values[regular])
        jw = torch.stack([jacobian(column) for column in w.T], 1)  # (p, m)
        quotient = torch.linalg.solve(projected, jw.T).T  # `projected` is symmetric
        # With fewer upper-level variables than vectors, p < m, the rest of Q has generalized singular value 0 and is
        # asked for. With more, Q is square anyway, and a full P would be p x p.
        _, values, qt = torch.linalg.svd(quotient, full_matrices=len(quotient) < quotient.shape[1])
        ascending = qt.T.flip(1)  # svd sorts its values in descending order
        found = torch.linalg.solve(projected, ascending)
        weighted = values[:, None] * qt[: len(values)] @ w.T
        estimator = ErrorEstimator(weighted, w, _norm_outside(weighted, w, earlier))
        return RecycleSpace(w @ self._choose(found), estimator), w.shape[1]

    def _choose(self, vectors: Tensor) -> Tensor:
        """The columns to keep. Those given belong to values in ascending order."""
        count = vectors.shape[1]
        if count <= self.dimension or self.end == "smallest":
            return vectors[:, : self.dimension]
        if self.end == "largest":
            return vectors[:, count - self.dimension :]
        small = self.dimension // 2
        return torch.cat([vectors[:, :small], vectors[:, count - (self.dimension - small) :]], 1)


def _norm_outside(weighted: Tensor, w: Tensor, earlier: ErrorEstimator | None) -> float:
    """The spectral norm of `weighted`, (k, n), on the part of span(W) that is orthogonal to the earlier W."""
    if earlier is not None:
        left, values, _ = torch.linalg.svd(w - earlier.basis @ (earlier.basis.T @ w), full_matrices=False)
        new = values > 1e-6  # the values are sines of angles between the spaces; smaller ones are rounding
        if new.any():
            weighted = weighted @ left[:, new]
    # The least generalized singular value in its place gave a third of the true error in both imaging experiments.
    return float(torch.linalg.matrix_norm(weighted, 2))


def dependent(dtype: torch.dtype) -> float:
    """Singular values below this share of the largest count as 0.

    It is 1e-10, or 3000 rounding errors if that is more, as in single precision.
    """
    return max(1e-10, 3000 * torch.finfo(dtype).eps)


def deflation(hessian: Callable[[Tensor], Tensor], vectors: Tensor) -> tuple[Tensor, Tensor]:
    """U and C = H U with C^T C = I, both (n, k'), where U spans `vectors`, (n, k), without the null space of H."""
    images = torch.stack([hessian(column) for column in vectors.T], 1)
    c, values, right = torch.linalg.svd(images, full_matrices=False)
    kept = values > dependent(vectors.dtype) * values[0]
    return vectors @ (right[kept].T / values[kept]), c[:, kept]
