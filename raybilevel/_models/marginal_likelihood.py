"""The marginal likelihood of a Gaussian process of values and derivatives, with its gradient in closed form.

gpytorch's, by automatic differentiation of lazily evaluated operators, is the same to rounding and takes ten times as
long. A fit evaluates it fifty times.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from scipy.optimize import Bounds, minimize
from torch import Tensor

Row = np.ndarray[Any, Any]
TOLERANCE = 1e-6
"""Of the value, at which a descent ends; 1e-5 saves no time."""
JITTERS = (0.0, 1e-9, 1e-8, 1e-7, 1e-6)
"""Added to the diagonal of a covariance, each after the one before was too little."""


class MarginalLikelihood:
    """-log p(targets, hyperparameters) per row, of the kernel, the noise and the priors of `DerivativeGP`.

    With r the targets less the mean, K their covariance and a = K^-1 r (Rasmussen & Williams 2006, eq. 5.9),

        d log p / dK = (a a' - K^-1) / 2,

    and what is left is the derivative of K. Rows come point by point and derivatives are along single coordinates, so
    that K needs one exponential for each pair of points, and for each pair of rows a product of differences of
    coordinates.

    hyperparameters: the mean, and the logarithms, less their floors, of the variance, the lengths and both noises.

    rows:    (x, s, a) of width 2 d + 1, values first (`gaussian_process`); targets: shape (n,).
    choices: coordinates of unordered choices.
    priors:  of as many lengths as there are coordinates, or of one for all.
    """

    def __init__(self, rows: Tensor, targets: Tensor, choices: Sequence[int], priors: Priors, nugget: float) -> None:
        d = (rows.shape[-1] - 1) // 2
        self.targets, self.priors, self.nugget = targets, priors, nugget
        self.lengths = len(priors.floors) - 3
        self.points, self.place = torch.unique(rows[:, :d], dim=0, return_inverse=True)
        self.values = int(rows[:, d].sum())
        self.weight, self.coordinate = rows[self.values :, d + 1 :].max(1)
        self.length = self.coordinate.clamp_max(self.lengths - 1)
        # x_c of the point of a row less that of each point, times the row's weight.
        own = self.points[self.place[self.values :], self.coordinate]
        self.across = self.weight.unsqueeze(1) * (own.unsqueeze(1) - self.points.T[self.coordinate])
        # Both along the same coordinate: their covariance has a term of its own. Few pairs of rows are such.
        self.one, self.other = (self.coordinate.unsqueeze(1) == self.coordinate).nonzero(as_tuple=True)
        self.alike = self.weight[self.one] * self.weight[self.other]
        self.features, owner = features(self.points, choices)
        self.owner = owner.clamp_max(self.lengths - 1)
        # 1 where a row is of a point.
        self.of_point = torch.nn.functional.one_hot(self.place, len(self.points)).to(rows)

    def __call__(self, hyperparameters: Row) -> tuple[float, Row]:
        """The value, and its gradient, shape (lengths + 4,)."""
        lengths, v, count = self.lengths, self.values, len(self.targets)
        given = torch.from_numpy(hyperparameters)
        mean, rising = given[0].item(), given[1:].exp()
        positive = rising + self.priors.floors
        variance, long, noises = positive[0], positive[1 : lengths + 1], positive[lengths + 1 :]
        steep = long.square().reciprocal()
        covariance, itself = self.covariance(variance, steep)
        steepest = steep.max()
        noise = torch.cat([
            (noises[0] + self.nugget * variance).expand(v),
            (noises[1] + self.nugget * variance * steepest).expand(count - v),
        ])  # fmt: skip
        residual = self.targets.clone()
        residual[:v] -= mean
        factor = factorised(covariance, noise)
        solved = torch.cholesky_solve(residual.unsqueeze(1), factor).squeeze(1)
        value = residual @ solved / 2 + factor.diagonal().log().sum() + count / 2 * math.log(2 * math.pi)
        # d value / dK.
        pull = torch.cholesky_inverse(factor).addr_(solved, solved, alpha=-1).div_(2)
        weighted, own = pull * covariance, pull.diagonal()
        # Of the lengths: by the distances of points, and by the coordinate that a derivative is along.
        of_points = self.of_point.T @ weighted @ self.of_point
        by_feature = (self.features * (of_points @ self.features)).sum(0) - of_points.sum(1) @ self.features.square()
        in_steep = torch.zeros_like(steep).index_add(0, self.owner, by_feature)
        in_steep = in_steep.index_add(0, self.length, 2 * weighted[v:].sum(1) / steep[self.length])
        alike = pull[v:, v:][self.one, self.other] * itself
        in_steep = in_steep.index_add(0, self.length[self.one], -alike / steep[self.length[self.one]])
        in_steep[steep.argmax()] += own[v:].sum() * self.nugget * variance
        in_variance = weighted.sum() / variance + self.nugget * (own[:v].sum() + own[v:].sum() * steepest)
        gradient = torch.cat([
            in_variance.unsqueeze(0), -2 * in_steep * steep / long, torch.stack([own[:v].sum(), own[v:].sum()])
        ])  # fmt: skip
        prior, in_prior = self.priors(positive)
        gradient = (gradient - in_prior) * rising
        value = value - prior + mean**2 / 2 + math.log(2 * math.pi) / 2
        in_mean = mean - solved[:v].sum().item()
        return value.item() / count, np.concatenate([[in_mean], gradient.numpy()]) / count

    def covariance(self, variance: Tensor, steep: Tensor) -> tuple[Tensor, Tensor]:
        """K without noise, shape (n, n), and that term of its own of derivatives along the same coordinate, by pair."""
        v = self.values
        scaled = self.features * steep[self.owner].sqrt()
        sizes = scaled.square().sum(1)
        squared = sizes.unsqueeze(1) + sizes - 2 * scaled @ scaled.T
        k = variance * torch.exp(-squared.clamp_min(0) / 2)
        # From points to rows by products with zeros and ones, which take less time than to gather columns.
        covariance = k[self.place] @ self.of_point.T
        along = (self.across * steep[self.length].unsqueeze(1)) @ self.of_point.T
        derivatives = covariance[v:, v:]
        itself = derivatives[self.one, self.other] * self.alike * steep[self.length[self.one]]
        covariance[v:, :v] *= -along[:, :v]
        covariance[:v, v:] = covariance[v:, :v].T
        derivatives.mul_(along[:, v:]).mul_(along[:, v:].T)
        derivatives[self.one, self.other] += itself
        return covariance, itself

    def descend(self, start: Row, bounds: Bounds, iterations: int) -> tuple[float, Row]:
        """The lowest value that L-BFGS-B reaches, and where."""
        options = {"maxiter": iterations, "ftol": TOLERANCE}
        start = start.clip(bounds.lb, bounds.ub)
        found = minimize(self, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
        return float(found.fun), found.x


class Priors:
    """Log-normal priors of positive hyperparameters: the variance, the lengths and both noises.

    location, scale: of their logarithms, shape (d + 3,).
    floors:          of the hyperparameters themselves, likewise.
    """

    def __init__(self, location: Tensor, scale: Tensor, floors: Tensor) -> None:
        self.location, self.scale, self.floors = location, scale, floors

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.location, self.scale, self.floors))

    def __call__(self, positive: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of their logarithms, shape (), and its gradient, shape (d + 3,)."""
        logs = positive.log()
        away = (logs - self.location) / self.scale
        constant = self.scale.log() + math.log(2 * math.pi) / 2
        return -(away.square() / 2 + logs + constant).sum(), -(1 + away / self.scale) / positive


def features(points: Tensor, choices: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Columns whose squared differences are those of the coordinates, and to which coordinate each belongs.

    An unordered choice has a one-hot code over sqrt(2), so that two different ones are at distance 1.
    """
    columns, owner = [], []
    for j, column in enumerate(points.T):
        code = column.unsqueeze(1)
        if j in choices:
            code = torch.nn.functional.one_hot(torch.unique(column, return_inverse=True)[1]).to(points) / math.sqrt(2)
        columns.append(code)
        owner += [j] * code.shape[1]
    return torch.cat(columns, 1), torch.tensor(owner)


def factorised(covariance: Tensor, noise: Tensor) -> Tensor:
    """The Cholesky factor of a covariance with noise on its diagonal.

    Raises:
        torch.linalg.LinAlgError: it is not positive definite, by far.
    """
    for jitter in JITTERS:
        noisy = covariance.clone()
        noisy.diagonal().add_(noise + jitter)
        factor, failed = torch.linalg.cholesky_ex(noisy)
        if not failed:
            break
    else:
        # For its message.
        factor = torch.linalg.cholesky(noisy)
    found: Tensor = factor
    return found
