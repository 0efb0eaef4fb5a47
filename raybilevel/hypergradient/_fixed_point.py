"""Fixed points y = g(y) by Anderson acceleration, for a lower level that is an equilibrium and for its derivative."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from raybilevel.errors import ConfigError, NotFiniteError


@dataclass(frozen=True)
class FixedPoint:
    """An approximate fixed point.

    y:          in the shape of the start, (rows, n).
    residual:   the largest |g(y) - y| / |g(y)| of a row.
    iterations: evaluations of g.
    """

    y: Tensor
    residual: float
    iterations: int


@dataclass(frozen=True)
class AndersonAcceleration:
    """Anderson acceleration (Anderson 1965; "type II" in Fang & Saad 2009).

    The next iterate is sum_i a_i g(y_i) over the last few iterates. The a_i have sum 1 and minimise
    |sum_i a_i (g(y_i) - y_i)|. Each row of y is treated by itself.

    tolerance: stop when |g(y) - y| <= tolerance |g(y)| in every row.
    limit:     stop after this many evaluations of g.
    memory:    number of iterates to combine; 1 is the plain iteration y = g(y).
    ridge:     added to the normal equations of the a_i, in units of their largest diagonal entry. It is at least ten
        rounding errors, as collinear residuals make the equations singular.
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
            # The sizes as well: a residual divided by a size that overflowed would be 0.
            if not (math.isfinite(relative) and bool(sizes.isfinite().all())):
                raise NotFiniteError(f"the fixed-point iteration is not finite after {iteration} evaluations")
            if relative <= self.tolerance:
                return FixedPoint(image, relative, iteration)
            images, residuals = [*images, image][-self.memory :], [*residuals, residual][-self.memory :]
            y = self._mixed(images, residuals)
        # The residual is that of the iterate before: another one would take one more evaluation of g.
        return FixedPoint(y, relative, self.limit)

    def _mixed(self, images: list[Tensor], residuals: list[Tensor]) -> Tensor:
        if len(images) == 1:
            return images[0]
        stacked = torch.stack(residuals, 1)  # (rows, m, n)
        gram = stacked @ stacked.mT  # (rows, m, m)
        scale = gram.diagonal(dim1=1, dim2=2).amax(1).clamp_min(1e-30)[:, None, None]
        eye = torch.eye(len(images)).to(gram)
        ones = gram.new_ones(len(gram), len(images), 1)
        ridge = max(self.ridge, 10 * torch.finfo(gram.dtype).eps)
        # With the constraint of sum 1 the minimiser is gram^-1 1, divided by its sum.
        weights = torch.linalg.solve(gram / scale + ridge * eye, ones)
        weights = weights / weights.sum(1, keepdim=True)
        mixed: Tensor = (weights * torch.stack(images, 1)).sum(1)
        return mixed
