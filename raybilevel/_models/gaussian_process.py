"""A Gaussian process that observes values and, at some points, gradients too.

Every observation is one row (x, s, a) of width 2 d + 1: for a value s = 1 and a = 0, for the derivative along
coordinate j s = 0 and a = e_j. So a point may come with its gradient or without, and the posterior is a BoTorch
model like any other.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import gpytorch
import numpy as np
import torch
from botorch.models.gpytorch import GPyTorchModel
from botorch.posteriors.gpytorch import GPyTorchPosterior
from gpytorch.constraints import GreaterThan
from gpytorch.distributions import MultivariateNormal
from gpytorch.likelihoods.gaussian_likelihood import _GaussianLikelihoodBase
from gpytorch.likelihoods.noise_models import Noise
from gpytorch.priors import LogNormalPrior, NormalPrior
from linear_operator.operators import DiagLinearOperator, to_linear_operator
from scipy.optimize import Bounds
from torch import Tensor, nn

from raybilevel._models.marginal_likelihood import MarginalLikelihood, Priors, Row, factorised

# `one_length` imports this module.
if TYPE_CHECKING:
    from raybilevel._models.one_length import OneLengthGP

NUGGET = 1e-9
ROUNDINGS = 16
"""Of values that are equal but for rounding, in units of their precision."""
SAME_CHOICE = 1e-6
"""Coordinates of one choice differ by rounding only."""
SCREENING, SCREENED = 10, 120
"""L-BFGS-B iterations from each of the two starts of the noise in `fit`, and rows of their likelihood."""


class DerivativeRBFKernel(gpytorch.kernels.Kernel):  # type: ignore[misc]
    """Covariance of values and derivatives of a process with kernel k(x, x') = exp(-|D|^2 / 2), D = (x - x') / l.

    With rows (x, s, a) and (x', s', a'), and L = diag(l):

        k * [s s' + s (a' . e) - s' (a . e) + a . L^-2 a' - (a . e)(a' . e)],   e = L^-2 (x - x'),

    which is gpytorch's `RBFKernelGrad` (Solak et al. 2003, eq. 3) restricted to the rows that were observed; that
    kernel insists on a gradient at every point.

    categorical: coordinates that stand for unordered choices. There D is 1 / l between different choices, whichever
        they are, and no derivative is observed: gpytorch's `CategoricalKernel` with the square of its distance.
    """

    has_lengthscale = True

    def __init__(self, dimension: int, categorical: Sequence[int] = ()) -> None:
        # The prior of Hvarfner, Hellsten & Nardi (2024), BoTorch's default: length scales grow with sqrt(d). Narrower
        # in few dimensions, where every coordinate matters: a short scale would rather mean that trainings are noisy.
        prior = LogNormalPrior(math.sqrt(2) + math.log(dimension) / 2, math.sqrt(min(3.0, 1 + math.log(dimension))))
        super().__init__(
            ard_num_dims=dimension,
            lengthscale_prior=prior,
            # The floor is BoTorch's default, too.
            lengthscale_constraint=logarithmic(2.5e-2, math.sqrt(dimension)),
        )
        self.dimension, self.categorical = dimension, tuple(categorical)
        smooth = torch.ones(dimension, dtype=torch.double)
        smooth[list(categorical)] = 0
        self.register_buffer("smooth", smooth)

    def forward(self, x1: Tensor, x2: Tensor, **_: Any) -> Tensor:
        d = self.dimension
        scale = self.lengthscale  # (1, d)
        # Divided by l, points give D and directions give a . e = (a / l) . D.
        p1, s1, a1 = x1[..., :d] / scale, x1[..., d : d + 1], x1[..., d + 1 :] / scale
        p2, s2, a2 = x2[..., :d] / scale, x2[..., d : d + 1], x2[..., d + 1 :] / scale
        apart: Tensor | float = 0.0
        if self.categorical:
            p1, p2 = p1 * self.smooth, p2 * self.smooth
            apart = self.between_choices(x1[..., :d], x2[..., :d])
        t1, t2 = p2.transpose(-1, -2), a2.transpose(-1, -2)
        k = torch.exp(-0.5 * (squared_distance(p1, p2) + apart))
        # a . e and a' . e of every pair, (..., n, m), without the (..., n, m, d) of the differences.
        along1 = (a1 * p1).sum(-1, keepdim=True) - a1 @ t1
        along2 = p1 @ t2 - (a2 * p2).sum(-1, keepdim=True).transpose(-1, -2)
        s2 = s2.transpose(-1, -2)
        full: Tensor = k * (s1 * s2 + s1 * along2 - s2 * along1 + a1 @ t2 - along1 * along2)
        return full

    def of_values(self, x1: Tensor, x2: Tensor) -> Tensor:
        """k of points, (..., n, d) and (..., m, d) -> (..., n, m)."""
        p1, p2 = x1 / self.lengthscale * self.smooth, x2 / self.lengthscale * self.smooth
        squared = squared_distance(p1, p2)
        if self.categorical:
            squared = squared + self.between_choices(x1, x2)
        return torch.exp(-0.5 * squared)

    def between_choices(self, x1: Tensor, x2: Tensor) -> Tensor:
        """Squared distance of unordered choices, (..., n, d) and (..., m, d) -> (..., n, m)."""
        chosen = list(self.categorical)
        differs = (x1[..., chosen].unsqueeze(-2) - x2[..., chosen].unsqueeze(-3)).abs() > SAME_CHOICE
        squared: Tensor = (differs / self.lengthscale[0, chosen].square()).sum(-1)
        return squared


def squared_distance(one: Tensor, other: Tensor) -> Tensor:
    """Of every pair of points, (..., n, d) and (..., m, d) -> (..., n, m)."""
    lengths = one.square().sum(-1, keepdim=True) + other.square().sum(-1).unsqueeze(-2)
    # A rounding error may be below 0.
    return (lengths - 2 * one @ other.transpose(-1, -2)).clamp_min(0.0)


class RowNoise(Noise):  # type: ignore[misc]
    """One noise variance for values, another for derivatives, both learned.

    Danskin's gradient is exact only at a minimiser, and a hypergradient only for a large multiplier: where enough
    values contradict them, their noise grows, and the model listens to the values.
    """

    def __init__(self, kernel: gpytorch.kernels.ScaleKernel) -> None:
        super().__init__()
        self._kernel = (kernel,)  # in a tuple, as it is the model's submodule and not this one's
        self.dimension = kernel.base_kernel.dimension
        # Variances of standardised values, with medians of 1e-4 for values and 7e-3 for derivatives.
        for name, prior in (("value", LogNormalPrior(-9.0, 2.0)), ("derivative", LogNormalPrior(-5.0, 2.0))):
            self.register_parameter(f"raw_{name}_noise", nn.Parameter(torch.zeros((), dtype=torch.double)))
            self.register_constraint(f"raw_{name}_noise", logarithmic(1e-8, prior.mode.item()))
            self.register_prior(f"{name}_prior", prior, lambda m, name=name: m.variance(name))

    def variance(self, name: str) -> Tensor:
        value: Tensor = getattr(self, f"raw_{name}_noise_constraint").transform(getattr(self, f"raw_{name}_noise"))
        return value

    def forward(self, *rows: Tensor, shape: torch.Size | None = None, **_: Any) -> DiagLinearOperator:
        # gpytorch's prediction passes the list of all training inputs in the place of the rows.
        row = rows[0][0] if isinstance(rows[0], list | tuple) else rows[0]
        s = row[..., self.dimension]
        # Gradients of a smooth kernel make nearly singular matrices: a nugget relative to the prior's variance.
        (kernel,) = self._kernel
        # It is a part of the noise: as an operator of its own it sends gpytorch through interpolated sparse matrices.
        nugget = NUGGET * kernel.outputscale
        # A derivative has the prior variance outputscale / l^2, the largest where l is least.
        steepest = kernel.base_kernel.lengthscale.min().square().reciprocal()
        return DiagLinearOperator(
            s * (self.variance("value") + nugget) + (1 - s) * (self.variance("derivative") + nugget * steepest)
        )


def logarithmic(floor: float, start: float) -> GreaterThan:
    """A positive hyperparameter, optimised on a logarithmic scale: noise spans many orders of magnitude."""
    return GreaterThan(floor, transform=torch.exp, inv_transform=torch.log, initial_value=start)


class DerivativeGP(gpytorch.models.ExactGP, GPyTorchModel):  # type: ignore[misc]
    """Zero-mean GP on standardised rows; `posterior(X)` is of values at points X, shape (..., q, d)."""

    # `GPyTorchModel.num_outputs` reads this.
    _num_outputs = 1

    def __init__(self, rows: Tensor, targets: Tensor, dimension: int, categorical: Sequence[int] = ()) -> None:
        kernel = gpytorch.kernels.ScaleKernel(
            DerivativeRBFKernel(dimension, categorical),
            outputscale_prior=LogNormalPrior(0.0, 1.5),
            outputscale_constraint=logarithmic(1e-6, 1.0),
        )
        super().__init__(rows, targets, _GaussianLikelihoodBase(RowNoise(kernel)))
        self.dimension = dimension
        self.covar_module = kernel
        # No gpytorch mean: only rows of values have it, as the derivative of a constant is 0.
        self.mean_constant = nn.Parameter(torch.zeros((), dtype=torch.double))
        self.register_prior("mean_prior", NormalPrior(0.0, 1.0), lambda m: m.mean_constant)
        self.to(torch.double)
        # Acquisitions are differentiated in x alone, and the fit has its own derivatives.
        self.requires_grad_(False)
        self._conditioned: Conditioned | None = None

    @property
    def bounds(self) -> Bounds:
        """Of the hyperparameters (logarithms, but for the mean), so that a line search cannot leave what is sane."""
        # At 30 sqrt(d) the two ends of a coordinate have a correlation of 0.999 or more: it has no effect.
        length = (math.log(1e-2), math.log(30 * math.sqrt(self.dimension)))
        variance, noise = (math.log(1e-3), math.log(1e3)), math.log(1e-8)
        pairs = [(-5.0, 5.0), variance, *[length] * self.dimension, (noise, 0.0), (noise, math.log(1e2))]
        return Bounds(*np.array(pairs).T)

    @property
    def hyperparameters(self) -> Row:
        """The mean, then the raw variance, lengths and noises of values and of derivatives, shape (d + 4,)."""
        return np.concatenate([parameter.numpy().ravel() for parameter in self._raw])

    @hyperparameters.setter
    def hyperparameters(self, found: Row) -> None:
        parts = np.split(found, [1, 2, 2 + self.dimension, 3 + self.dimension])
        for parameter, part in zip(self._raw, parts, strict=True):
            parameter.copy_(torch.from_numpy(part).reshape(parameter.shape))
        self._conditioned = None

    @property
    def _raw(self) -> tuple[nn.Parameter, ...]:
        kernel, noise = self.covar_module, self.likelihood.noise_covar
        return (
            self.mean_constant, kernel.raw_outputscale, kernel.base_kernel.raw_lengthscale,
            noise.raw_value_noise, noise.raw_derivative_noise,
        )  # fmt: skip

    @property
    def priors(self) -> Priors:
        """Of the hyperparameters but the mean, in their order."""
        kernel, noise = self.covar_module, self.likelihood.noise_covar
        lengths, d = kernel.base_kernel, self.dimension
        found = [
            (kernel.outputscale_prior, kernel.raw_outputscale_constraint, 1),
            (lengths.lengthscale_prior, lengths.raw_lengthscale_constraint, d),
            (noise.value_prior, noise.raw_value_noise_constraint, 1),
            (noise.derivative_prior, noise.raw_derivative_noise_constraint, 1),
        ]
        columns = [
            [prior.loc.item(), prior.scale.item(), constraint.lower_bound.item()]
            for prior, constraint, count in found
            for _ in range(count)
        ]
        return Priors(*torch.tensor(columns, dtype=torch.double).T)

    def forward(self, rows: Tensor) -> MultivariateNormal:
        return MultivariateNormal(self.mean_constant * rows[..., self.dimension], self.covar_module(rows))

    def set_train_data(self, *args: Any, **kwargs: Any) -> None:
        super().set_train_data(*args, **kwargs)
        self._conditioned = None

    @property
    def categorical(self) -> tuple[int, ...]:
        """Coordinates of choices without an order."""
        found: tuple[int, ...] = self.covar_module.base_kernel.categorical
        return found

    @property
    def lengths(self) -> Tensor:
        """Of the coordinates, shape (d,)."""
        found: Tensor = self.covar_module.base_kernel.lengthscale.squeeze(0)
        return found

    @property
    def value_noise(self) -> float:
        found: Tensor = self.likelihood.noise_covar.variance("value")
        return found.item()

    @property
    def has_derivatives(self) -> bool:
        """Whether it has observed any derivative."""
        return not bool(self.train_inputs[0][:, self.dimension].all())

    def observe(self, points: Tensor, targets: Tensor) -> None:
        """Values at more points, shapes (m, d) and (m,), with the same hyperparameters."""
        rows = torch.cat([self.train_inputs[0], value_rows(points)])
        # strict=False lets the number of rows change.
        self.set_train_data(rows, torch.cat([self.train_targets, targets]), strict=False)

    @property
    def conditioned(self) -> Conditioned:
        """On the rows that it has now."""
        if self._conditioned is None:
            self._conditioned = Conditioned.of(self)
        return self._conditioned

    def posterior(
        self,
        X: Tensor,
        output_indices: list[int] | None = None,
        observation_noise: bool = False,
        posterior_transform: Any = None,
    ) -> GPyTorchPosterior:
        assert output_indices is None and observation_noise is False
        # Not gpytorch's, whose lazy operators take ten times as long for the few points of an acquisition.
        return as_posterior(self.conditioned.moments(X), posterior_transform)


def as_posterior(moments: tuple[Tensor, Tensor], transform: Any = None) -> GPyTorchPosterior:
    """Of values with a mean and a covariance."""
    mean, covariance = moments
    # As an operator, which is factorised only where samples are drawn, and then with a jitter.
    found = GPyTorchPosterior(MultivariateNormal(mean, to_linear_operator(covariance)))
    return found if transform is None else transform(found)


@dataclass(frozen=True)
class Conditioned:
    """The posterior of values: with K the covariance of the rows, k that of a point with them, and r the targets less
    their mean, m + k K^-1 r and k(x, x') - k K^-1 k'.

    points, place: of the rows, shapes (p, d) and (n,).
    is_value, directions, along: of each row s, a / l^2 and a . x / l^2, shapes (n,), (n, d) and (n,).
    weights: K^-1 r, shape (n,); whitening: the inverse of the Cholesky factor of K, shape (n, n).
    """

    kernel: DerivativeRBFKernel
    mean: Tensor
    variance: Tensor
    points: Tensor
    place: Tensor
    is_value: Tensor
    directions: Tensor
    along: Tensor
    weights: Tensor
    whitening: Tensor

    @classmethod
    def of(cls, model: DerivativeGP) -> Conditioned:
        d, rows = model.dimension, model.train_inputs[0]
        kernel, variance = model.covar_module.base_kernel, model.covar_module.outputscale
        points, place = torch.unique(rows[:, :d], dim=0, return_inverse=True)
        noise = model.likelihood.noise_covar(rows).diagonal()
        factor = factorised(variance * kernel.forward(rows, rows), noise)
        residual = (model.train_targets - model.mean_constant * rows[:, d]).unsqueeze(1)
        weights = torch.cholesky_solve(residual, factor).squeeze(1)
        whitening = torch.linalg.solve_triangular(factor, torch.eye(len(rows)).to(factor), upper=False)
        directions = rows[:, d + 1 :] / kernel.lengthscale.square()
        along = (directions * rows[:, :d]).sum(1)
        return cls(
            kernel, model.mean_constant, variance, points, place, rows[:, d], directions, along, weights, whitening
        )

    def across(self, x: Tensor) -> Tensor:
        """k at points, shape (..., q, d) -> (..., q, n)."""
        near = self.variance * self.kernel.of_values(x, self.points)
        # k (s' + a' . e), e = L^-2 (x - x').
        return near[..., self.place] * (self.is_value + x @ self.directions.T - self.along)

    def means(self, x: Tensor) -> Tensor:
        """At points, shape (..., q, d) -> (..., q)."""
        # The rows of a point are one here: m + sum_i k_i (a_i + b_i . L^-2 (x - x_i)).
        values, slopes = self.by_point
        near = self.variance * self.kernel.of_values(x, self.points)
        return self.mean + (near * (values - (slopes * self.points).sum(1) + x @ slopes.T)).sum(-1)

    @cached_property
    def by_point(self) -> tuple[Tensor, Tensor]:
        """a and L^-2 b of the points, shapes (p,) and (p, d)."""
        zero = torch.zeros(len(self.points), dtype=self.weights.dtype)
        values = zero.index_add(0, self.place, self.weights * self.is_value)
        slopes = torch.zeros_like(self.points).index_add(0, self.place, self.weights.unsqueeze(1) * self.directions)
        return values, slopes

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and covariance at points, shape (..., q, d) -> (..., q) and (..., q, q)."""
        across = self.across(x)
        whitened = across @ self.whitening.T
        prior = self.variance * self.kernel.of_values(x, x)
        return self.mean + across @ self.weights, prior - whitened @ whitened.transpose(-1, -2)


def differs(spread: float, value: float) -> bool:
    """Whether a spread of numbers about a value is more than rounding."""
    return spread > ROUNDINGS * torch.finfo(torch.double).eps * abs(value)


@dataclass(frozen=True)
class FittedGP:
    """A fitted process together with the shift and scale of what it observed."""

    model: DerivativeGP | OneLengthGP
    shift: float
    scale: float

    def mean(self, x: Tensor) -> Tensor:
        """Posterior mean at x, shape (d,) -> (), differentiable."""
        return self.shift + self.scale * self.model.conditioned.means(x.unsqueeze(0)).squeeze()

    def deviation(self, x: Tensor) -> Tensor:
        """Posterior standard deviation (noise excluded) at x, shape (d,) -> ()."""
        _, covariance = self.model.conditioned.moments(x.unsqueeze(0))
        return self.scale * covariance.squeeze().clamp_min(0).sqrt()


def value_rows(x: Tensor) -> Tensor:
    """Rows that observe values at x, shape (..., n, d) -> (..., n, 2 d + 1)."""
    return torch.cat([x, torch.ones_like(x[..., :1]), torch.zeros_like(x)], dim=-1)


def derivative_rows(x: Tensor, gradient: Tensor | None = None, weight: float = 1.0) -> Tensor:
    """Rows that observe the gradient, times a weight, at one point x, shape (d,) -> (d, 2 d + 1); with a gradient,
    shape (d,), only those entries of it that are known, i.e. not NaN."""
    d = len(x)
    rows = torch.cat([x.expand(d, d), torch.zeros(d, 1, dtype=x.dtype), weight * torch.eye(d, dtype=x.dtype)], dim=-1)
    return rows if gradient is None else rows[~gradient.isnan()]


def relative(gradients: Mapping[int, Tensor]) -> dict[int, float]:
    """1 / sqrt(1 + (|g_i| / median |g|)^2) of each gradient."""
    lengths = {i: gradient.nan_to_num(0.0).norm().item() for i, gradient in gradients.items()}
    typical = statistics.median(lengths.values()) if lengths else 0.0
    return {i: 1 / math.hypot(1.0, length / typical) if typical > 0 else 1.0 for i, length in lengths.items()}


def standardised(values: Tensor, gradients: Mapping[int, Tensor]) -> tuple[float, float]:
    """Shift and scale of values, shape (n,)."""
    # The deviation of a single value is NaN.
    shift, scale = values.mean().item(), values.std().item() if len(values) > 1 else 0.0
    # Equal values differ by rounding, which is nothing to be scaled up to 1.
    if not differs(scale, shift):
        steepest = torch.cat([torch.zeros(1, dtype=values.dtype), *gradients.values()]).nan_to_num(0.0).abs().max()
        scale = steepest.item() or 1.0
    return shift, scale


def fit(
    x: Tensor,
    values: Tensor,
    gradients: Mapping[int, Tensor],
    max_iterations: int = 50,
    max_rows: int = 250,
    infer_gradient_noise: bool = True,
    categorical: Sequence[int] = (),
) -> FittedGP:
    """Fit to values, shape (n,), at x, shape (n, d), and gradients, shape (d,), at the points whose index is a key.

    Entries of a gradient that are not known are NaN: hyperparameters that do not stand in the loss have no derivative.

    Values are standardised; the hyperparameters maximise the marginal likelihood times the priors, always from the
    same start, so that equal data give an equal model. They are fitted on at most `max_rows` rows (`spaced`:
    each likelihood costs their cube, many times over), the posterior then conditions on all rows, once.

    infer_gradient_noise: the gradients may contradict the values. Their errors are relative: with g_i the gradients,
        the rows of each are divided by sqrt(1 + (|g_i| / median |g|)^2), so that one noise serves for all.
    categorical:          coordinates that stand for unordered choices.
    """
    shift, scale = standardised(values, gradients)
    # The rows of all values, then those of the derivatives that are known.
    weights = relative(gradients) if infer_gradient_noise else dict.fromkeys(gradients, 1.0)
    rows = torch.cat([
        value_rows(x), *(derivative_rows(x[i], gradient, weights[i]) for i, gradient in gradients.items())
    ])  # fmt: skip
    # A derivative is scaled as values are, but not shifted.
    known = [gradient[~gradient.isnan()] * (weights[i] / scale) for i, gradient in gradients.items()]
    targets = torch.cat([(values - shift) / scale, *known])
    # The posterior is conditioned on all rows.
    model = DerivativeGP(rows, targets, x.shape[-1], categorical).eval()

    def some(most: int) -> MarginalLikelihood:
        # Rows drawn at random, or all derivatives of fewer points, were worse on digits with 64 decays (method.md).
        chosen = spaced(rows[:, -x.shape[-1] :].sign(), most)
        return MarginalLikelihood(rows[chosen], targets[chosen], categorical, model.priors, NUGGET)

    start = model.hyperparameters
    if len(rows) > len(x) and infer_gradient_noise:
        # The likelihood has an optimum where derivatives are exact and one where they are noise, far apart: a few
        # iterations from either side, on fewer rows, show which is better.
        as_noise = start.copy()
        as_noise[-1] = targets[len(x) :].square().mean().clamp(1e-6, 10.0).log()
        few = some(min(SCREENED, max_rows))
        _, start = min((few.descend(s, model.bounds, SCREENING) for s in (start, as_noise)), key=lambda f: f[0])
    _, model.hyperparameters = some(max_rows).descend(start, model.bounds, max_iterations)
    return FittedGP(model, shift, scale)


def spaced(derivatives: Tensor, most: int) -> Tensor:
    """Numbers of at most so many rows, evenly spaced, of rows whose derivatives are along unit vectors, shape (n, d); 0
    for values. The rows come point by point, so that some spacings leave out whole coordinates: the next wider one that
    leaves each a third of its share is taken, if there is one."""
    count = len(derivatives)
    if count <= most:
        return torch.arange(count)

    def evenly(number: int) -> Tensor:
        return torch.linspace(0, count - 1, number).round().long()

    for number in range(most, most // 2, -1):
        chosen = evenly(number)
        met = derivatives[chosen].sum(0)
        if bool((met >= (met.mean() / 3).floor()).all()):
            return chosen
    return evenly(most)
