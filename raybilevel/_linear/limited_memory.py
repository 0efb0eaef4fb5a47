"""A preconditioner from the last Krylov vectors, and a rule for when it is used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

MOST_PAIRS = 40
MOST_NUMBERS = 2**22
"""In all pairs: they are in every checkpoint of a descent, and in double precision this is 32 MiB."""
LEAST_CURVATURE = 1e-2
"""In units of the largest. Directions with less are dropped, as are those of negative curvature."""
LEAST_SAVED = 0.2
"""Share of the iterations that the preconditioner has to save: applying it takes time as well."""


class Pair(NamedTuple):
    """A Krylov vector and its product with H, both of shape (n,)."""

    vector: Tensor
    image: Tensor


@dataclass(frozen=True)
class Preconditioner:
    """The limited memory preconditioner of Gratton, Sartenaer & Tshimanga 2011, SIAM J. Optim. 21(3):

        P = S^T A^+ S + scale (I - S^T A^+ Y) (I - Y^T A^+ S),    A = S Y^T,

    the block form of a BFGS update (Morales & Nocedal 2000, SIAM J. Optim. 10(4)) of scale I. P y = s for each pair.
    It is positive definite even where Y is of an earlier H. So a change of H costs iterations and not accuracy, and no
    product with the new H.

    vectors:  S, shape (m, n).
    images:   Y, the rows of S times H, shape (m, n).
    inverse:  A^+, the pseudoinverse of the positive part of A, shape (m, m).
    """

    vectors: Tensor
    images: Tensor
    inverse: Tensor
    scale: float

    def __call__(self, residual: Tensor) -> Tensor:
        """P r, of shape (n,)."""
        inside = self.inverse @ (self.vectors @ residual)
        outside = self.scale * (residual - self.images.T @ inside)
        applied: Tensor = outside + self.vectors.T @ (inside - self.inverse @ (self.images @ outside))
        return applied


@dataclass(frozen=True)
class LimitedMemory:
    """The last Krylov vectors, and whether they are worth their use.

    The preconditioner costs no products, but time, and may save nothing: where H changes much from one system to the
    next, or where a few directions are not what slows the solves down. So it is not used at first, and solves number 4,
    8, 16, ... are done the other way, without it or with it. It is better if it has saved a fifth of the iterations
    against the solve before. If that is news, the solve after the next is another trial, and two that agree decide. A
    count decides and no clock, so that runs repeat.

    pairs:      the newest last; at most 40, and fewer if n is large.
    solves:     so far.
    iterations: of the last one.
    worth:      whether the preconditioner is used, except in a trial of the other way.
    in_doubt:   whether the last trial says otherwise.
    """

    pairs: tuple[Pair, ...] = ()
    solves: int = 0
    iterations: int = 0
    worth: bool = False
    in_doubt: bool = False

    @staticmethod
    def capacity(size: int) -> int:
        """The most pairs of n = `size` numbers each."""
        return min(MOST_PAIRS, MOST_NUMBERS // (2 * size))

    @property
    def in_trial(self) -> bool:
        """Whether the next solve tries the other way."""
        number = self.solves + 1
        return is_trial(number) or (self.in_doubt and is_trial(number - 2))

    def preconditioner(self) -> Preconditioner | None:
        """For the next solve; None if it does without."""
        if self.worth == self.in_trial or not self.pairs:
            return None
        vectors, images = (torch.stack(part) for part in zip(*self.pairs, strict=True))
        # A small matrix: in double precision and on the CPU, whatever the weights are.
        product = (vectors @ images.T).cpu().double()
        product = (product + product.T) / 2  # pairs of different systems make it unsymmetric
        lengths, stretched = (part.norm(dim=1).cpu().double() for part in (vectors, images))
        # By curvature, which may vanish: not by less than this share of the most that it can be.
        size = product.diagonal().abs().maximum(LEAST_CURVATURE * lengths * stretched)
        units = size.rsqrt().where(size > 0, 0)
        values, directions = torch.linalg.eigh(units[:, None] * product * units)
        kept = values > LEAST_CURVATURE * values[-1].abs()
        if not kept.any():  # no direction of positive curvature
            return None
        inverse = units[:, None] * (directions[:, kept] / values[kept] @ directions[:, kept].T) * units
        scale = (stretched / lengths).square().mean().rsqrt().item()
        return Preconditioner(vectors, images, inverse.to(vectors), scale)

    def after(self, krylov: Sequence[Pair], iterations: int, preconditioned: bool, met: bool) -> LimitedMemory:
        """The memory after one more solve.

        krylov: of that solve.
        met:    whether it met its criterion. If not, H may be singular and b not in its range. Such a system has other
            least-squares solutions with a preconditioner than without, so the pairs are dropped.
        """
        worth, in_doubt = self.worth, self.in_doubt
        if self.in_trial and self.pairs:
            using, without = (iterations, self.iterations) if preconditioned else (self.iterations, iterations)
            news = (using <= (1 - LEAST_SAVED) * without) != worth
            worth, in_doubt = worth != (news and in_doubt), news and not in_doubt
        most = self.capacity(len(krylov[0].vector)) if krylov else MOST_PAIRS
        pairs = (*self.pairs, *krylov)[-most:] if met else ()
        return LimitedMemory(pairs, self.solves + 1, iterations, worth, in_doubt)


def is_trial(number: int) -> bool:
    """Whether a solve, counted from 1, is 4, 8, 16, ..."""
    return number >= 4 and number & (number - 1) == 0
