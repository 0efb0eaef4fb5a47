"""A Gaussian process with one length scale for all coordinates, which holds gradients in any dimension.

Let Q be an orthonormal basis of the span of n points less their mean, of r < n columns. All points have the coordinate
0 along a direction outside of it. So derivatives along such directions have no covariance with values and with
derivatives along Q, and those along each of them have the same m x m covariance among the m gradients (de Roos, Gessner
& Hennig 2021, arXiv:2102.07542),

    M_ij = (variance / l^2) w_i w_j exp(-|x_i - x_j|^2 / (2 l^2)) + noise_ij.

What is left is a process in the r coordinates Q' (x - mean), with n + m r rows, and M, whatever d is.

Where coordinates differ in how far they matter, one length is wrong along each of them, and so many equal errors of
derivatives would outweigh the values: these were taken for noise, and the function for a plane. So values have no more
noise than they have without derivatives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from botorch.models.model import Model
from botorch.posteriors.gpytorch import GPyTorchPosterior
from scipy.optimize import minimize
from torch import Tensor

from raybilevel._models.gaussian_process import (
    NUGGET,
    DerivativeGP,
    FittedGP,
    as_posterior,
    derivative_rows,
    relative,
    spaced,
    squared_distance,
    standardised,
    value_rows,
)
from raybilevel._models.marginal_likelihood import MarginalLikelihood, Priors, Row, factorised

SCREENING, ITERATIONS = 6, 40
"""L-BFGS-B iterations from each start of the noise, and from the better one."""
ROWS = 250
"""Of values and derivatives along Q in the likelihood. The process is conditioned on all."""
VALUE_NOISE = 3
"""Its place among the hyperparameters."""


@dataclass(frozen=True)
class Observed:
    """What is observed, standardised.

    points, values: shapes (n, d) and (n,).
    which:     of the points that have a gradient, shape (m,).
    gradients: at these, shape (m, d).
    weights:   by which rows of derivatives and their targets are multiplied, shape (m,).
    """

    points: Tensor
    values: Tensor
    which: Tensor
    gradients: Tensor
    weights: Tensor

    @cached_property
    def centre(self) -> Tensor:
        return self.points.mean(0)

    @cached_property
    def basis(self) -> Tensor:
        """Q, shape (d, r)."""
        _, sizes, directions = torch.linalg.svd(self.points - self.centre, full_matrices=False)
        # Q may have a direction more than the span. Where all points are equal, it has one.
        count = max(1, int((sizes > 1e-9).sum()))
        found: Tensor = directions[:count].T.contiguous()
        return found

    @cached_property
    def inside(self) -> tuple[Tensor, Tensor]:
        """Rows of width 2 r + 1 of values and of derivatives along Q, and their targets."""
        z = (self.points - self.centre) @ self.basis
        rows = [derivative_rows(z[i], None, w) for i, w in zip(self.which.tolist(), self.weights.tolist(), strict=True)]
        along = self.weights.unsqueeze(1) * self.gradients @ self.basis
        return torch.cat([value_rows(z), *rows]), torch.cat([self.values, along.flatten()])

    @cached_property
    def outside(self) -> Tensor:
        """The weighted gradients without what is along Q, shape (m, d)."""
        left = self.gradients - self.gradients @ self.basis @ self.basis.T
        return self.weights.unsqueeze(1) * left

    @property
    def free(self) -> int:
        """Of directions outside of the span."""
        return self.basis.shape[0] - self.basis.shape[1]

    def alike(self, length: float) -> tuple[Tensor, Tensor]:
        """w_i w_j exp(-|x_i - x_j|^2 / (2 l^2)) and |x_i - x_j|^2 of points with gradients, shapes (m, m)."""
        at = self.points[self.which]
        squared = squared_distance(at, at)
        return torch.outer(self.weights, self.weights) * torch.exp(-squared / (2 * length**2)), squared


class OneLengthLikelihood:
    """As `MarginalLikelihood`, of all values and gradients, those along Q evenly spaced; hyperparameters are the mean,
    variance, length and both noises."""

    def __init__(self, observed: Observed, priors: Priors) -> None:
        rows, targets = observed.inside
        n, r = len(observed.points), observed.basis.shape[1]
        chosen = torch.cat([torch.arange(n), n + spaced(rows[n:, -r:].sign(), ROWS - n)])
        self.observed, self.priors = observed, priors
        self.inside = MarginalLikelihood(rows[chosen], targets[chosen], (), priors, NUGGET)
        self.squares = observed.outside @ observed.outside.T

    def __call__(self, hyperparameters: Row) -> tuple[float, Row]:
        value, gradient = self.inside(hyperparameters)
        rows, free, count = len(self.inside.targets), self.observed.free, len(self.squares)
        rising = np.exp(hyperparameters[1:])
        variance, length, _, noise = rising + self.priors.floors.numpy()
        alike, squared = self.observed.alike(length)
        steep, one = 1 / length**2, torch.eye(count, dtype=alike.dtype)
        factor = factorised(variance * steep * alike, torch.full((count,), noise + NUGGET * variance * steep).double())
        inverse = torch.cholesky_inverse(factor)
        # -log p of the derivatives along each direction outside, and its derivative by M.
        outside = free * factor.diagonal().log().sum() + (inverse * self.squares).sum() / 2
        pull = (free * inverse - inverse @ self.squares @ inverse) / 2
        in_variance = steep * (alike + NUGGET * one)
        in_length = variance * steep / length * (alike * (squared * steep - 2) - 2 * NUGGET * one)
        more = [(pull * part).sum().item() for part in (in_variance, in_length)]
        extra = rising * np.array([*more, 0.0, pull.diagonal().sum().item()])
        whole = rows + free * count
        total = rows * value + outside.item() + free * count / 2 * math.log(2 * math.pi)
        return total / whole, (rows * gradient + np.concatenate([[0.0], extra])) / whole


def likelihood_of_values(observed: Observed, priors: Priors) -> MarginalLikelihood:
    rows, targets = observed.inside
    n = len(observed.points)
    return MarginalLikelihood(rows[:n], targets[:n], (), priors, NUGGET)


class OneLengthGP(Model):  # type: ignore[misc]
    """The process of `Observed` with given hyperparameters; of the same use as `DerivativeGP`."""

    categorical: tuple[int, ...] = ()
    has_derivatives = True

    def __init__(self, observed: Observed, hyperparameters: Row, priors: Priors) -> None:
        super().__init__()
        self.mean = float(hyperparameters[0])
        self.variance, self.length, self.value_noise, self.noise = (
            np.exp(hyperparameters[1:]) + priors.floors.numpy()
        ).tolist()
        self.observed, self.priors = observed, priors
        self._conditioned: OneLengthConditioned | None = None

    @property
    def num_outputs(self) -> int:
        return 1

    @property
    def lengths(self) -> Tensor:
        return torch.full((self.observed.points.shape[1],), self.length, dtype=torch.double)

    @property
    def conditioned(self) -> OneLengthConditioned:
        if self._conditioned is None:
            self._conditioned = OneLengthConditioned.of(self)
        return self._conditioned

    def observe(self, points: Tensor, targets: Tensor) -> None:
        """Values at more points, shapes (k, d) and (k,), with the same hyperparameters."""
        before = self.observed
        self.observed = Observed(
            torch.cat([before.points, points]), torch.cat([before.values, targets]), before.which, before.gradients,
            before.weights,
        )  # fmt: skip
        self._conditioned = None

    def posterior(
        self,
        X: Tensor,
        output_indices: list[int] | None = None,
        observation_noise: bool = False,
        posterior_transform: Any = None,
    ) -> GPyTorchPosterior:
        assert output_indices is None and observation_noise is False
        return as_posterior(self.conditioned.moments(X), posterior_transform)


@dataclass(frozen=True)
class OneLengthConditioned:
    """The posterior of values; as `Conditioned`, with the rows of values and of derivatives along Q in its place, and

    outside: M^-1, shape (m, m).
    """

    observed: Observed
    mean: Tensor
    variance: float
    length: float
    is_value: Tensor
    place: Tensor
    weights: Tensor
    whitening: Tensor
    outside: Tensor

    @classmethod
    def of(cls, model: OneLengthGP) -> OneLengthConditioned:
        observed, variance, steep = model.observed, model.variance, 1 / model.length**2
        rows, targets = observed.inside
        r, nugget = observed.basis.shape[1], NUGGET * variance
        place = torch.cat([torch.arange(len(observed.points)), observed.which.repeat_interleave(r)])
        is_value = rows[:, r]
        inside = MarginalLikelihood(rows, targets, (), model.priors, NUGGET)
        covariance, _ = inside.covariance(*torch.tensor([[variance], [steep]], dtype=torch.double))
        noise = is_value * (model.value_noise + nugget) + (1 - is_value) * (model.noise + nugget * steep)
        factor = factorised(covariance, noise)
        residual = (targets - model.mean * is_value).unsqueeze(1)
        weights = torch.cholesky_solve(residual, factor).squeeze(1)
        whitening = torch.linalg.solve_triangular(factor, torch.eye(len(rows)).to(factor), upper=False)
        likeness, _ = observed.alike(model.length)
        among = variance * steep * likeness + (model.noise + nugget * steep) * torch.eye(len(likeness)).to(likeness)
        mean = torch.tensor(model.mean, dtype=torch.double)
        return cls(observed, mean, variance, model.length, is_value, place, weights, whitening, torch.linalg.inv(among))

    @property
    def points(self) -> Tensor:
        return self.observed.points

    @cached_property
    def by_point(self) -> tuple[Tensor, Tensor]:
        """a and L^-2 b of the points, shapes (n,) and (n, d)."""
        observed, n = self.observed, len(self.points)
        along = self.weights[n:].reshape(len(observed.which), -1) @ observed.basis.T
        slopes = observed.weights.unsqueeze(1) * (along + self.outside @ observed.outside) / self.length**2
        return self.weights[:n], torch.zeros_like(self.points).index_add(0, observed.which, slopes)

    def means(self, x: Tensor) -> Tensor:
        """At points, shape (..., q, d) -> (..., q)."""
        values, slopes = self.by_point
        near = _near(x, self.points, self.variance, self.length)
        return self.mean + (near * (values - (slopes * self.points).sum(1) + x @ slopes.T)).sum(-1)

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and covariance at points, shape (..., q, d) -> (..., q) and (..., q, q)."""
        observed, steep = self.observed, 1 / self.length**2
        rows, _ = observed.inside
        r = observed.basis.shape[1]
        away = x - observed.centre
        z = away @ observed.basis
        left = away - z @ observed.basis.T
        near = _near(x, self.points, self.variance, self.length)
        directions = steep * rows[:, r + 1 :]
        across = near[..., self.place] * (self.is_value + z @ directions.T - (directions * rows[:, :r]).sum(1))
        whitened = across @ self.whitening.T
        # Derivatives outside of the span have a covariance with a value as far as that point is outside, too.
        beside = near[..., observed.which] * observed.weights
        among = beside @ self.outside @ beside.transpose(-1, -2) * (left @ left.transpose(-1, -2)) * steep**2
        covariance = _near(x, x, self.variance, self.length) - whitened @ whitened.transpose(-1, -2) - among
        return self.means(x), covariance


def _near(one: Tensor, other: Tensor, variance: float, length: float) -> Tensor:
    return variance * torch.exp(-squared_distance(one / length, other / length) / 2)


def fit_one_length(x: Tensor, values: Tensor, gradients: Mapping[int, Tensor]) -> FittedGP:
    """As `gaussian_process.fit`, with one length scale, to whole gradients."""
    shift, scale = standardised(values, gradients)
    weights = relative(gradients)
    observed = Observed(
        x,
        (values - shift) / scale,
        torch.tensor(list(gradients)),
        torch.stack(list(gradients.values())) / scale,
        torch.tensor(list(weights.values()), dtype=x.dtype),
    )
    # Hyperparameters, bounds and priors of one length are those of the first of many.
    model = DerivativeGP(value_rows(x), observed.values, x.shape[1])
    one = [0, 1, 2, -2, -1]
    priors = Priors(*(column[[0, 1, -2, -1]] for column in model.priors))
    low, high, start = model.bounds.lb[one], model.bounds.ub[one], model.hyperparameters[one]

    def descend(likelihood: Callable[[Row], tuple[float, Row]], begin: Row, iterations: int = ITERATIONS) -> Any:
        options = {"maxiter": iterations, "ftol": 1e-7}
        bounds = list(zip(low, high, strict=True))
        return minimize(likelihood, begin.clip(low, high), jac=True, method="L-BFGS-B", bounds=bounds, options=options)

    high[VALUE_NOISE] = descend(likelihood_of_values(observed, priors), start).x[VALUE_NOISE]
    likelihood, as_noise = OneLengthLikelihood(observed, priors), start.copy()
    as_noise[-1] = math.log((observed.gradients * observed.weights.unsqueeze(1)).square().mean().clamp(1e-6, 10.0))
    # From where derivatives are exact and from where they are noise, as there.
    better = min((descend(likelihood, begin, SCREENING) for begin in (start, as_noise)), key=lambda found: found.fun)
    return FittedGP(OneLengthGP(observed, descend(likelihood, better.x).x, priors), shift, scale)
