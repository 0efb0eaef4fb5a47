"""Which directions of one linear system to keep for the next: (harmonic) Ritz, Ritz generalized singular vectors."""

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
    """|J H^-1 r| from what an earlier system has shown (Ehrhardt, Gazzola & Scott, arXiv:2412.08264).

    On W, orthonormal, J H^-1 is about J W (W^T H W)^-1 W^T = P S Q^T W^T; outside W it is taken to be no larger than
    `rest`. The paper has no such second term, without which a residual that has left W would count as no error.

    weighted: S Q^T W^T, shape (k, n).
    basis:    W, shape (n, m).
    rest:     the norm of S Q^T W^T on what W has and the W of the system before had not: how large J H^-1 turned out to
        be where nothing was known of it. The largest generalized singular value where there was no system before.
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
    """vectors: U, shape (n, k); estimator: of the error of J q, where the strategy has seen J."""

    vectors: Tensor
    estimator: ErrorEstimator | None = None


@dataclass(frozen=True)
class Selection:
    """What to keep of W = [U, V], the recycled vectors and the Krylov basis of one solve.

    strategy: "ritz": eigenvectors of W^T H W. "harmonic_ritz": of (H W)^T H W z = theta W^T H W z.
        "ritz_generalized_singular": right generalized singular vectors of the pair (J W, W^T H W), which take into
        account the Jacobian that multiplies the solution.
    end: which values: of Ritz and harmonic Ritz, "smallest" are the ones that slow MINRES down; of generalized singular
        ones, "largest" are those that matter most for J q; "mixed" is half of either.
    dimension:    how many vectors to keep.
    most_vectors: Krylov vectors that a solve stores at most, twice (the vector and its product with H).
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
        """The space to keep of W and H W, both (n, m), None where H annihilates all that is known; and how many
        products with J it took.

        earlier: estimator that the system before left.
        """
        # Orthonormal basis; directions that are numerically dependent are dropped.
        sizes = w.norm(dim=0)
        w, hw = w / sizes, hw / sizes
        left, values, right = torch.linalg.svd(w, full_matrices=False)
        rank = int((values > dependent(w.dtype) * values[0]).sum())
        w = left[:, :rank]
        hw = hw @ (right[:rank].T / values[:rank])
        projected = w.T @ hw
        projected = (projected + projected.T) / 2
        if self.strategy == "ritz_generalized_singular":
            return self._generalized_singular(w, projected, jacobian, earlier)
        if self.strategy == "ritz":
            _, vectors = torch.linalg.eigh(projected)
        else:
            # With theta the harmonic Ritz value, W^T H W z = (1 / theta) (H W)^T H W z, and H W Z orthonormal for a Z
            # from its singular value decomposition, without what H annihilates.
            _, values, right = torch.linalg.svd(hw, full_matrices=False)
            kept = values > 10 * torch.finfo(hw.dtype).eps * values[0]
            if not kept.any():
                return None, 0
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
        """With W^T H W invertible the generalized singular value decomposition of (J W, W^T H W) is the singular value
        decomposition P S Q^T of the quotient J W (W^T H W)^-1: left vectors Q, right vectors (W^T H W)^-1 Q. Where
        W^T H W is singular, W is reduced to where it is not."""
        values, vectors = torch.linalg.eigh(projected)
        regular = values.abs() > 10 * torch.finfo(w.dtype).eps * values.abs().max()
        if not regular.any():
            return None, 0
        if not regular.all():
            w, projected = w @ vectors[:, regular], torch.diag(values[regular])
        jw = torch.stack([jacobian(column) for column in w.T], 1)
        quotient = torch.linalg.solve(projected, jw.T).T
        # With fewer upper-level variables than vectors the rest of Q has generalized singular value 0; with more Q is
        # whole in any case, and a full P would be as large as the square of their number.
        _, values, qt = torch.linalg.svd(quotient, full_matrices=len(quotient) < quotient.shape[1])
        ascending = qt.T.flip(1)
        found = torch.linalg.solve(projected, ascending)
        weighted = values[:, None] * qt[: len(values)] @ w.T
        estimator = ErrorEstimator(weighted, w, _norm_outside(weighted, w, earlier))
        return RecycleSpace(w @ self._choose(found), estimator), w.shape[1]

    def _choose(self, vectors: Tensor) -> Tensor:
        """Columns that belong to values in ascending order -> those to keep."""
        count = vectors.shape[1]
        if count <= self.dimension or self.end == "smallest":
            return vectors[:, : self.dimension]
        if self.end == "largest":
            return vectors[:, count - self.dimension :]
        small = self.dimension // 2
        return torch.cat([vectors[:, :small], vectors[:, count - (self.dimension - small) :]], 1)


def _norm_outside(weighted: Tensor, w: Tensor, earlier: ErrorEstimator | None) -> float:
    """The spectral norm of `weighted`, (k, n), on the part of the span of W that an earlier W did not have."""
    if earlier is not None:
        left, values, _ = torch.linalg.svd(w - earlier.basis @ (earlier.basis.T @ w), full_matrices=False)
        new = values > 1e-6  # sines of angles between the spaces; below, rounding
        if new.any():
            weighted = weighted @ left[:, new]
    return float(torch.linalg.matrix_norm(weighted, 2))


def dependent(dtype: torch.dtype) -> float:
    """Singular values below this share of the largest are taken for 0: 1e-10, or 3000 rounding errors where that is
    more, as in single precision."""
    return max(1e-10, 3000 * torch.finfo(dtype).eps)


def deflation(hessian: Callable[[Tensor], Tensor], vectors: Tensor) -> tuple[Tensor, Tensor]:
    """U and C = H U with C^T C = I that span what `vectors`, (n, k), span, less what H annihilates."""
    images = torch.stack([hessian(column) for column in vectors.T], 1)
    c, values, right = torch.linalg.svd(images, full_matrices=False)
    kept = values > dependent(vectors.dtype) * values[0]
    return vectors @ (right[kept].T / values[kept]), c[:, kept]
