"""Where trainings succeed: a Gaussian process classifier of those that ended well and those that failed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from raybilevel._models.value_function import thinned
from raybilevel.search_state import Training

LENGTHS = (0.2, 0.4, 0.8, 1.6)
"""Length scales among which the evidence chooses, in units of sqrt(d) / 2."""
DEVIATIONS = (1.0, 3.0, 10.0)
"""Of the latent process, likewise."""
NEWTON_STEPS = 30
MAX_POINTS = 200


@dataclass(frozen=True)
class Feasibility:
    """The probability that a training at x succeeds, sigmoid(g(x) - s(x)), at the posterior mode of a latent process

        g(x) = constant + k(x)' r,   k_i(x) = variance exp(-|x - x_i|^2 / (2 length^2)),   r_i = t_i - sigmoid(g(x_i))

    with t_i = 1 where the training at x_i has succeeded, else 0, and s its standard deviation: the Laplace
    approximation of Rasmussen & Williams (2006), Gaussian Processes for Machine Learning, section 3.4. One deviation of
    caution keeps the search from finding the border of what fails by failing: with the mean of sigmoid(g) two trainings
    of three fail beside it.

    points:    x_i, shape (n, d), in the unit cube.
    residuals: r, shape (n,).
    bend:      B^(1/2), the root of sigmoid'(g) at the points, shape (n,).
    factor:    the Cholesky factor of I + B^(1/2) K B^(1/2), shape (n, n).
    evidence:  the approximate log marginal likelihood, their eq. 3.32.
    """

    points: Tensor
    residuals: Tensor
    bend: Tensor
    factor: Tensor
    constant: float
    variance: float
    length: float
    evidence: float

    def log_probability(self, x: Tensor) -> Tensor:
        """The logarithm of that probability at points, shape (..., d) -> (...), differentiable."""
        near = kernel(x, self.points, self.variance, self.length)
        # v of their Algorithm 3.2, so that the variance is k(x, x) - v'v.
        scaled = (near * self.bend).unsqueeze(-1)
        explained = torch.linalg.solve_triangular(self.factor, scaled, upper=False).square().sum((-2, -1))
        deviation = (self.variance - explained).clamp_min(1e-12).sqrt()
        return logsigmoid(self.constant + near @ self.residuals - deviation)


def kernel(x: Tensor, other: Tensor, variance: float, length: float) -> Tensor:
    squared = (x.unsqueeze(-2) - other).square().sum(-1)
    return variance * torch.exp(-squared / (2 * length**2))


def fit_feasibility(ended: Sequence[Training], near: Tensor) -> Feasibility | None:
    """Of trainings that ended, failed ones among them; None where there is no failed one.

    near: a point of the unit cube; of very many trainings, those near it are kept, and some others (`thinned`).
    """
    if not any(t.status == "failed" for t in ended):
        return None
    ended = thinned(ended, near, MAX_POINTS)
    points = torch.tensor([t.unit for t in ended], dtype=torch.double)
    succeeded = torch.tensor([t.status != "failed" for t in ended])
    # Half of the diagonal of the cube.
    half = math.sqrt(points.shape[1]) / 2
    # A single failure does not tell where trainings fail: with a larger deviation it fences off most of the box.
    deviations = DEVIATIONS[:1] if (~succeeded).sum() < 2 else DEVIATIONS
    fits = (classified(points, succeeded, a, b * half) for a, b in itertools.product(deviations, LENGTHS))
    return max(fits, key=lambda found: found.evidence)


def classified(points: Tensor, succeeded: Tensor, deviation: float, length: float) -> Feasibility:
    """The classifier for points, shape (n, d), of which some succeeded, shape (n,): Algorithm 3.1 of Rasmussen &
    Williams (2006), with the odds of all points, one more of either kind among them, as constant."""
    ones = succeeded.to(points)
    # One more of either kind, or the odds were infinite where all have failed.
    constant = math.log((ones.sum().item() + 1) / ((1 - ones).sum().item() + 1))
    variance = deviation**2
    covariance = kernel(points, points, variance, length)
    latent, weights = torch.zeros_like(ones), torch.zeros_like(ones)
    for _ in range(NEWTON_STEPS):
        p = torch.sigmoid(constant + latent)
        bend = (p * (1 - p)).sqrt()
        factor = torch.linalg.cholesky(torch.eye(len(points)).double() + bend.unsqueeze(1) * covariance * bend)
        # Their b, with W = bend^2. The weights are their a, which is t - sigmoid(g) at the mode: the residuals.
        target = bend.square() * latent + ones - p
        inner = torch.cholesky_solve((bend * (covariance @ target)).unsqueeze(1), factor).squeeze(1)
        before, weights = weights, target - bend * inner
        latent = covariance @ weights
        if (weights - before).abs().max() < 1e-8:
            break
    likelihood = logsigmoid(torch.where(succeeded, 1.0, -1.0) * (constant + latent)).sum()
    evidence = likelihood - weights @ latent / 2 - factor.diagonal().log().sum()
    return Feasibility(points, weights, bend, factor, constant, variance, length, evidence.item())
