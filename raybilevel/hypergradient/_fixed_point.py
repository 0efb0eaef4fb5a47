"""Fixed points y = g(y) by Anderson acceleration: of a lower level that is an equilibrium, and of its derivative."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from raybilevel.errors import ConfigError, NotFiniteError


@dataclass(frozen=True)
class FixedPoint:
    """y, in the shape of the start; residual: largest |g(y) - y| / |g(y)| of a row; iterations: evaluations of g."""

    y: Tensor
    residual: float
    iterations: int


@dataclass(frozen=True)
class AndersonAcceleration:
    """The next iterate is sum_i a_i g(y_i) over the last few, with the a_i, of sum 1, that minimise
    |sum_i a_i (g(y_i) - y_i)| (Anderson 1965; "type II" in Fang & Saad 2009), each row of y by itself.

    tolerance: it ends where |g(y) - y| <= tolerance |g(y)| in every row,
    limit:     or after this many evaluations of g.
    memory:    how many iterates are combined; 1 is the plain iteration y = g(y).
    ridge:     added to the normal equations of the a_i, in units of their largest diagonal entry; at least ten rounding
        errors, as collinear residuals make them singular.
    """

    tolerance: float = 1e-4
    limit: int = 100
    memory: int = 5
    ridge: float = 1e-8

    def __post_init__(self) -> None:
        if self.limit < 1 or self.memory < 1 or not min(self.tolerance, self.ridge) > 0:
            raise ConfigError(
                "Anderson acceleration needs limit and memory of at least 1, and a positive tolerance and ridge, got "
                f"{self.limit}, {self.memory}, {self.tolerance} and {self.ridge}"
            )

    @torch.no_grad()
    def solve(self, step: Callable[[Tensor], Tensor], start: Tensor) -> FixedPoint:
        """The fixed point of `step`, (rows, n) -> (rows, n).

        Raises:
            NotFiniteError: an iterate is NaN or infinite.
        """
        y, images, residuals = start.detach(), list[Tensor](), list[Tensor]()
        relative = float("inf")
        for iteration in range(1, self.limit + 1):
            image = step(y)
            residual = image - y
            sizes = image.norm(dim=1)
            relative = float((residual.norm(dim=1) / sizes.clamp_min(1e-30)).max())
            # a residual divided by a size that overflowed would be 0
            if not (math.isfinite(relative) and bool(sizes.isfinite().all())):
                raise NotFiniteError(f"the fixed-point iteration is not finite after {iteration} evaluations")
            if relative <= self.tolerance:
                return FixedPoint(image, relative, iteration)
            images, residuals = [*images, image][-self.memory :], [*residuals, residual][-self.memory :]
            y = self._mixed(images, residuals)
        return FixedPoint(y, relative, self.limit)

    def _mixed(self, images: list[Tensor], residuals: list[Tensor]) -> Tensor:
        if len(images) == 1:
            return images[0]
        # (rows, m, n)
        stacked = torch.stack(residuals, 1)
        gram = stacked @ stacked.mT
        scale = gram.diagonal(dim1=1, dim2=2).amax(1).clamp_min(1e-30)[:, None, None]
        eye = torch.eye(len(images)).to(gram)
        ones = gram.new_ones(len(gram), len(images), 1)
        ridge = max(self.ridge, 10 * torch.finfo(gram.dtype).eps)
        weights = torch.linalg.solve(gram / scale + ridge * eye, ones)
        weights = weights / weights.sum(1, keepdim=True)
        mixed: Tensor = (weights * torch.stack(images, 1)).sum(1)
        return mixed
