"""A Gaussian process that observes values and, at some points, gradients too.

Every observation is one row (x, s, a) of width 2 d + 1: for a value s = 1 and a = 0, for the derivative along
coordinate j s = 0 and a = e_j. So a point may come with its gradient or without, and the posterior is a BoTorch
model like any other.
"""

from __future__ import annotations

import copy
import math
import statistics
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import gpytorch
import torch
from botorch.exceptions.warnings import OptimizationWarning
from botorch.models.gpytorch import GPyTorchModel
from botorch.optim.fit import fit_gpytorch_mll_scipy
from botorch.posteriors.gpytorch import GPyTorchPosterior
from gpytorch.constraints import GreaterThan
from gpytorch.distributions import MultivariateNormal
from gpytorch.likelihoods.gaussian_likelihood import _GaussianLikelihoodBase
from gpytorch.likelihoods.noise_models import Noise
from gpytorch.priors import LogNormalPrior, NormalPrior
from linear_operator.operators import DiagLinearOperator
from torch import Tensor, nn

NUGGET = 1e-9
ROUNDINGS = 16
"""Of values that are equal but for rounding, in units of their precision."""
SAME_CHOICE = 1e-6
"""Coordinates of one choice differ by rounding only."""
# L-BFGS-B iterations from each of the two starts of the noise in `fit`.
SCREENING = 10


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

    def __init__(self, dimension: int, ard: bool = True, categorical: Sequence[int] = ()) -> None:
        # The prior of Hvarfner, Hellsten & Nardi (2024), BoTorch's default: length scales grow with sqrt(d). Narrower
        # in few dimensions, where every coordinate matters: a short scale would rather mean that trainings are noisy.
        count = dimension if ard else 1
        prior = LogNormalPrior(math.sqrt(2) + math.log(dimension) / 2, math.sqrt(min(3.0, 1 + math.log(dimension))))
        super().__init__(
            ard_num_dims=count if ard else None,
            lengthscale_prior=prior,
            # The floor is BoTorch's default, too.
            lengthscale_constraint=logarithmic(2.5e-2, math.sqrt(dimension)),
        )
        self.dimension, self.categorical = dimension, tuple(categorical)
        smooth = torch.ones(dimension, dtype=torch.double)
        smooth[list(categorical)] = 0
        self.register_buffer("smooth", smooth)

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **_: Any) -> Tensor:
        d = self.dimension
        scale = self.lengthscale  # (1, d) or (1, 1)
        # Divided by l, points give D and directions give a . e = (a / l) . D.
        p1, s1, a1 = x1[..., :d] / scale, x1[..., d : d + 1], x1[..., d + 1 :] / scale
        p2, s2, a2 = x2[..., :d] / scale, x2[..., d : d + 1], x2[..., d + 1 :] / scale
        apart: Tensor | float = 0.0
        if self.categorical:
            p1, p2 = p1 * self.smooth, p2 * self.smooth
            apart = self.between_choices(x1[..., :d], x2[..., :d], diag)
        if diag:
            p, s, a = p1 - p2, (s1 * s2).squeeze(-1), (a1 * a2).sum(-1)
            k = torch.exp(-0.5 * (p.square().sum(-1) + apart))
            along1, along2 = (a1 * p).sum(-1), (a2 * p).sum(-1)
            diagonal: Tensor = k * (s + s1.squeeze(-1) * along2 - s2.squeeze(-1) * along1 + a - along1 * along2)
            return diagonal
        t1, t2 = p2.transpose(-1, -2), a2.transpose(-1, -2)
        k = torch.exp(-0.5 * (self.covar_dist(p1, p2, square_dist=True, diag=False) + apart))
        # a . e and a' . e of every pair, (..., n, m), without the (..., n, m, d) of the differences.
        along1 = (a1 * p1).sum(-1, keepdim=True) - a1 @ t1
        along2 = p1 @ t2 - (a2 * p2).sum(-1, keepdim=True).transpose(-1, -2)
        s2 = s2.transpose(-1, -2)
        full: Tensor = k * (s1 * s2 + s1 * along2 - s2 * along1 + a1 @ t2 - along1 * along2)
        return full

    def between_choices(self, x1: Tensor, x2: Tensor, diag: bool) -> Tensor:
        """Squared distance of unordered choices, (..., n, d) and (..., m, d) -> (..., n, m); of pairs, (..., n)."""
        scale = self.lengthscale.expand(1, self.dimension)
        total: Tensor | None = None
        for j in self.categorical:
            one, other = x1[..., j], x2[..., j]
            differs = (one - other if diag else one.unsqueeze(-1) - other.unsqueeze(-2)).abs() > SAME_CHOICE
            part = differs / scale[0, j].square()
            total = part if total is None else total + part
        assert total is not None
        return total


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

    def __init__(
        self, rows: Tensor, targets: Tensor, dimension: int, ard: bool, categorical: Sequence[int] = ()
    ) -> None:
        kernel = gpytorch.kernels.ScaleKernel(
            DerivativeRBFKernel(dimension, ard, categorical),
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

    def bounds(self) -> dict[str, tuple[float, float]]:
        """Of the hyperparameters (logarithms, but for the mean), so that a line search cannot leave what is sane."""
        # At 30 sqrt(d) the two ends of a coordinate have a correlation of 0.999 or more: it has no effect.
        longest = math.log(30 * math.sqrt(self.dimension))
        return {
            "mean_constant": (-5.0, 5.0),
            "covar_module.raw_outputscale": (math.log(1e-3), math.log(1e3)),
            "covar_module.base_kernel.raw_lengthscale": (math.log(1e-2), longest),
            "likelihood.noise_covar.raw_value_noise": (math.log(1e-8), 0.0),
            "likelihood.noise_covar.raw_derivative_noise": (math.log(1e-8), math.log(1e2)),
        }

    def forward(self, rows: Tensor) -> MultivariateNormal:
        return MultivariateNormal(self.mean_constant * rows[..., self.dimension], self.covar_module(rows))

    def posterior(self, X: Tensor, *args: Any, **kwargs: Any) -> GPyTorchPosterior:
        with exact():
            return super().posterior(value_rows(X), *args, **kwargs)


def differs(spread: float, value: float) -> bool:
    """Whether a spread of numbers about a value is more than rounding."""
    return spread > ROUNDINGS * torch.finfo(torch.double).eps * abs(value)


@dataclass(frozen=True)
class FittedGP:
    """A fitted process together with the shift and scale of what it observed."""

    model: DerivativeGP
    shift: float
    scale: float

    @property
    def has_derivatives(self) -> bool:
        """Whether it has observed any derivative."""
        (rows,) = self.model.train_inputs
        d = (rows.shape[-1] - 1) // 2
        return not bool(rows[:, d].all())

    def mean(self, x: Tensor) -> Tensor:
        """Posterior mean at x, shape (d,) -> (), differentiable."""
        mean: Tensor = self.model.posterior(x.unsqueeze(0)).mean
        return self.shift + self.scale * mean.squeeze()

    def deviation(self, x: Tensor) -> Tensor:
        """Posterior standard deviation (noise excluded) at x, shape (d,) -> ()."""
        variance: Tensor = self.model.posterior(x.unsqueeze(0)).variance
        return self.scale * variance.squeeze().clamp_min(0).sqrt()


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


def fit(
    x: Tensor,
    values: Tensor,
    gradients: Mapping[int, Tensor],
    ard: bool = True,
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
    # The deviation of a single value is NaN.
    shift, scale = values.mean().item(), values.std().item() if len(values) > 1 else 0.0
    # Equal values differ by rounding, which is nothing to be scaled up to 1.
    if not differs(scale, shift):
        steepest = torch.cat([torch.zeros(1, dtype=x.dtype), *gradients.values()]).nan_to_num(0.0).abs().max().item()
        scale = steepest or 1.0
    # The rows of all values, then those of the derivatives that are known.
    weights = relative(gradients) if infer_gradient_noise else dict.fromkeys(gradients, 1.0)
    rows = torch.cat([
        value_rows(x), *(derivative_rows(x[i], gradient, weights[i]) for i, gradient in gradients.items())
    ])  # fmt: skip
    # A derivative is scaled as values are, but not shifted.
    known = [gradient[~gradient.isnan()] * (weights[i] / scale) for i, gradient in gradients.items()]
    targets = torch.cat([(values - shift) / scale, *known])
    # Rows drawn at random, or all derivatives of fewer points, were worse on digits with 64 decays (method.md).
    chosen = spaced(rows[:, -x.shape[-1] :].sign(), max_rows)
    model = DerivativeGP(rows[chosen], targets[chosen], x.shape[-1], ard, categorical)
    marginal = gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model)

    def descend(iterations: int) -> float:
        options = {"maxiter": iterations, "ftol": 1e-6}
        with exact(), warnings.catch_warnings():
            warnings.simplefilter("ignore", OptimizationWarning)  # an iteration limit is not a failure here
            return float(fit_gpytorch_mll_scipy(marginal, bounds=model.bounds(), options=options).fval)

    if len(rows) > len(x) and infer_gradient_noise:
        # The likelihood has an optimum where derivatives are exact and one where they are noise, far apart: a few
        # iterations from either side show which is better.
        believed = copy.deepcopy(model.state_dict())
        noise = targets[len(x) :].square().mean().clamp(1e-6, 10.0)
        model.likelihood.noise_covar.initialize(raw_derivative_noise=noise.log())
        as_noise = descend(SCREENING), copy.deepcopy(model.state_dict())
        model.load_state_dict(believed)
        # fval is the negative logarithm, so that the larger one is the worse.
        if descend(SCREENING) > as_noise[0]:
            model.load_state_dict(as_noise[1])
    descend(max_iterations)
    # The posterior, conditioned on all rows.
    model.eval()
    if len(chosen) < len(rows):
        model.set_train_data(rows, targets, strict=False)
    # Acquisitions are differentiated in x alone.
    model.requires_grad_(False)
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


@contextmanager
def exact() -> Iterator[None]:
    """Dense Cholesky algebra at every size: gpytorch's default switches to conjugate gradients above 800 rows."""
    with (
        gpytorch.settings.max_cholesky_size(1_000_000),
        gpytorch.settings.fast_computations(False, False, False),
        gpytorch.settings.cholesky_jitter(double_value=1e-9),
        warnings.catch_warnings(),
    ):
        # linear_operator builds a sparse matrix without saying whether it should be checked.
        warnings.filterwarnings("ignore", message="Sparse invariant checks")
        yield
