"""How far hyperparameters of a kind may differ, by the evidence of the model of F: shrinkage against overtuning.

Within a group the prior is x ~ N(the group's mean, 1 / (n tau)) in the unit cube, and exp(-n G) is the likelihood
(`shrinkage`). The mode of the posterior and the Laplace approximation of the evidence for tau are

    x_tau = argmin_x G(x) + (tau / 2) |P x|^2
    log p(tau) = -n G(x_tau) - (n tau / 2) |P x_tau|^2 - (1 / 2) sum_j log(1 + e_j / tau)

with e_j the curvatures of G at x_tau in the range of P (MacKay 1992, "Bayesian interpolation"). It is the idea of James
and Stein (1961) for hyperparameters: a group whose members have nothing to tell apart collapses to one value, at no
loss, and one that has keeps its freedom. What it cures is overtuning (Schneider et al. 2025, arXiv:2506.19540).

The examples determine s = d - rank P + sum_j e_j / (e_j + tau) hyperparameters; `shrinkage.expected_loss` says what
follows for new data.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Any, Protocol

import numpy as np
import torch
from scipy.optimize import Bounds, minimize
from torch import Tensor

from raybilevel._models.acquisition import UpperModel
from raybilevel._models.gaussian_process import SAME_CHOICE
from raybilevel._models.shrinkage import SMALLEST_ERROR, Groups, off_bounds, off_mean
from raybilevel.search_state import Likelihood, Shrinkage

Array = np.ndarray[Any, Any]
STRENGTHS = tuple(10 ** (3 - i / 4) for i in range(25))
"""Of tau, strong to weak, 1000 to 0.001."""
LEAST_SHARE = 0.1
"""Of the lowest squared error seen, below which the model is not believed: it may even be negative there, and its
logarithm would draw the search to where nothing is known."""
NAT = 1.0
"""The strongest tau within so much of the best log evidence is taken: it is flat there, and the model too hopeful.
Where even the weakest is within it, F is noise or has no bends that are seen, and nothing is held."""
STEADY = 3
"""Steps over which the log evidence is averaged: each has another model of F, and sees the bends anew."""
SAME_MERIT = 1e-6
"""Two minima that differ by less are one, found twice."""
REACH = 0.2
"""How far beyond the incumbent and its shrunk image x_tau is sought on a model of F."""


class LogLikelihood(Protocol):
    """G on the unit cube, at points of shape (d,)."""

    def value(self, x: Tensor) -> float: ...

    def value_and_gradient(self, x: Tensor) -> tuple[float, Tensor]: ...

    def hessian(self, x: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Surface:
    """G by the posterior mean of F, in closed form: F(x) = exp(shift + scale m(x)) + offset with

        m = constant + sum_i k_i q_i,   k_i = exp(-D_i . (x - x_i) / 2),   D_i = L^-2 (x - x_i),   q_i = a_i + b_i . D_i

    for a process that has observed values with weights a_i and derivatives with weights b_i (`DerivativeRBFKernel`).

    points:             x_i, shape (k, d).
    value_weights:      a, shape (k,).
    derivative_weights: b, shape (k, d).
    inverse_squares:    the diagonal of L^-2, shape (d,).
    floor:              the least squared error that is believed.
    unordered:          coordinates of choices without an order, in which D is 0 and k falls by another factor.
    """

    points: Tensor
    value_weights: Tensor
    derivative_weights: Tensor
    inverse_squares: Tensor
    constant: float
    shift: float
    scale: float
    offset: float
    floor: float
    likelihood: Likelihood
    unordered: tuple[int, ...] = ()

    @classmethod
    def of(cls, model: UpperModel, likelihood: Likelihood) -> Surface:
        gaussian, conditioned = model.process.model, model.process.model.conditioned
        values, slopes = conditioned.by_point
        # k_i of `Surface` is without the variance of the kernel, which goes into the weights.
        return cls(
            conditioned.points,
            conditioned.variance * values,
            conditioned.variance * slopes * gaussian.lengths.square(),
            gaussian.lengths.square().reciprocal(),
            conditioned.mean.item(),
            model.process.shift,
            model.process.scale,
            model.warp.low - model.warp.spread,
            max(LEAST_SHARE * model.warp.low, SMALLEST_ERROR),
            likelihood,
            gaussian.categorical,
        )

    @property
    def differentiated(self) -> Tensor:
        """Points whose hypergradients the process holds, shape (k, d): not all that are known, where rows run out."""
        return self.points[self.derivative_weights.any(1)]

    def value(self, x: Tensor) -> float:
        return self.value_and_gradient(x)[0]

    def value_and_gradient(self, x: Tensor) -> tuple[float, Tensor]:
        """G, and its gradient, shape (d,)."""
        mean, gradient, *_ = self._mean(x.numpy())
        above = math.exp(self.shift + self.scale * mean)
        slope = above * self.scale * torch.from_numpy(gradient)
        if self.likelihood == "log_likelihood":
            return above + self.offset, slope
        upper = max(above + self.offset, self.floor)
        return math.log(upper) / 2, slope / (2 * upper)

    def hessian(self, x: Tensor) -> Tensor:
        """Of G, shape (d, d)."""
        mean, *arrays = self._mean(x.numpy())
        gradient, k, difference, q = map(torch.from_numpy, arrays)
        # Hess m = sum_i k_i (q_i D_i D_i' - D_i (L^-2 b_i)' - (L^-2 b_i) D_i' - q_i L^-2)
        cross = difference.T @ (k.unsqueeze(1) * self.derivative_weights * self.inverse_squares)
        weighted = k * q
        second = difference.T @ (weighted.unsqueeze(1) * difference) - cross - cross.T
        second = second - torch.diag(weighted.sum() * self.inverse_squares)
        outer = torch.outer(gradient, gradient)
        above = math.exp(self.shift + self.scale * mean)
        # Hess F = e^(shift + scale m) (scale Hess m + scale^2 grad m grad m')
        hessian = above * (self.scale * second + self.scale**2 * outer)
        if self.likelihood == "log_likelihood":
            return hessian
        upper = max(above + self.offset, self.floor)
        # G = log(F) / 2:   Hess G = Hess F / (2 F) - grad F grad F' / (2 F^2)
        return hessian / (2 * upper) - (above * self.scale / upper) ** 2 * outer / 2

    def _mean(self, x: Array) -> tuple[float, Array, Array, Array, Array]:
        """m, its gradient, and k, D and q at every point; in NumPy, which takes a fifth of the time at this size."""
        points, a, b, steep = self._arrays
        away = x - points
        differs = np.abs(away[:, self.unordered]) > SAME_CHOICE
        away[:, self.unordered] = 0
        difference = away * steep
        apart = differs @ steep[list(self.unordered)]
        k = np.exp(-((away * difference).sum(1) + apart) / 2)
        q = a + (b * difference).sum(1)
        # grad m = sum_i k_i (L^-2 b_i - q_i D_i)
        gradient = (k @ b) * steep - (k * q) @ difference
        return self.constant + float(k @ q), gradient, k, difference, q

    @cached_property
    def _arrays(self) -> tuple[Array, Array, Array, Array]:
        found = (self.points, self.value_weights, self.derivative_weights, self.inverse_squares)
        return found[0].numpy(), found[1].numpy(), found[2].numpy(), found[3].numpy()


@dataclass(frozen=True)
class Mode:
    """x_tau, the log evidence for tau, and the hyperparameters that are supported there."""

    strength: float
    x: Tensor
    evidence: float
    supported: float


def learn(
    surface: Surface,
    groups: tuple[tuple[int, ...], ...],
    examples: int,
    around: Tensor,
    before: Sequence[Sequence[float]] = (),
    applied: bool = True,
) -> Shrinkage:
    """Of the model of F, with x_tau sought around a point of the unit cube, shape (d,).

    before: the evidence that earlier steps have found.
    """
    seen = surface.differentiated - around
    if not groups:
        unit, moving = tuple(around.tolist()), adapted_at(surface, groups, 0.0, around, seen)
        return Shrinkage(groups, surface.likelihood, examples, 0.0, unit, float(len(unit)), applied, moving)
    found = list(modes(surface, groups, examples, around, off_mean(seen, groups)))
    best = max(mode.evidence for mode in found)
    evidence = tuple(mode.evidence - best for mode in found)
    mode = found[selected([fmean(step) for step in zip(*before[1 - STEADY :], evidence, strict=True)])]
    return Shrinkage(
        groups,
        surface.likelihood,
        examples,
        mode.strength,
        tuple(mode.x.tolist()),
        mode.supported,
        applied,
        adapted_at(surface, groups, mode.strength, mode.x, seen),
        evidence,
    )


def modes(
    surface: LogLikelihood,
    groups: Groups,
    examples: int,
    around: Tensor,
    seen: Tensor,
    strengths: Sequence[float] = STRENGTHS,
    reach: float = REACH,
) -> Iterator[Mode]:
    """For each strength, strong to weak. It is sought from where the one before has ended, and from where the next
    weaker one did: what is found from the groups' means alone may stay in a valley beside that of `around`.

    seen:  directions along which hypergradients are known, shape (k, d).
    reach: how far beyond `around` and its shrunk image x_tau is sought.
    """
    # Of P: each group loses its mean.
    rank = sum(len(group) - 1 for group in groups)
    # The first strength is the strongest, under which groups all but collapse.
    x = around - off_mean(around, groups)
    low = (torch.minimum(x, around) - reach).clamp(0, 1)
    high = (torch.maximum(x, around) + reach).clamp(0, 1)
    basis = orthonormal(seen)
    weakened: list[Tensor] = []
    if not torch.equal(x, around):
        other = around
        for strength in reversed(strengths):
            other = penalised_minimum(surface, groups, strength, low, high, other)
            weakened.append(other)
    for strength in strengths:
        x = penalised_minimum(surface, groups, strength, low, high, x)
        if weakened:
            other = weakened.pop()
            if merit(surface, groups, strength, other) < merit(surface, groups, strength, x) - SAME_MERIT:
                x = other
        bends = curvatures(surface.hessian(x), basis, rank)
        # log p(tau) of the module's docstring.
        evidence = -examples * merit(surface, groups, strength, x) - (bends / strength).log1p().sum().item() / 2
        supported = len(x) - rank + (bends / (bends + strength)).sum().item()
        yield Mode(strength, x, evidence, supported)


def adapted_at(surface: LogLikelihood, groups: Groups, strength: float, x: Tensor, seen: Tensor) -> float | None:
    """How many of the hyperparameters that the examples determine are at no bound; None where all of them are at none.

    x:    the mode, shape (d,).
    seen: points at which hypergradients are known, less some point, shape (k, d).
    """
    free, within = off_bounds(x, groups)
    if len(free) == len(x):
        return None
    rank = sum(len(group) - 1 for group in within)
    if not rank:
        return float(len(free))
    bends = curvatures(surface.hessian(x)[free][:, free], orthonormal(off_mean(seen[:, free], within)), rank)
    return len(free) - rank + (bends / (bends + strength)).sum().item()


def selected(evidence: Sequence[float]) -> int:
    """The place of the strongest within a nat of the best, of log evidence in the order strong to weak; that of the
    weakest where all are."""
    within = [place for place, value in enumerate(evidence) if value >= max(evidence) - NAT]
    return within[-1] if len(within) == len(evidence) else within[0]


def merit(surface: LogLikelihood, groups: Groups, strength: float, x: Tensor) -> float:
    """G + (tau / 2) |P x|^2."""
    return surface.value(x) + strength / 2 * off_mean(x, groups).square().sum().item()


def penalised_minimum(
    surface: LogLikelihood, groups: Groups, strength: float, low: Tensor, high: Tensor, start: Tensor
) -> Tensor:
    """A local minimum of `merit` in a box, shape (d,), by L-BFGS-B."""

    members = [np.array(group) for group in groups]

    def differentiated(point: Array) -> tuple[float, Array]:
        value, gradient = surface.value_and_gradient(torch.from_numpy(point))
        off = np.zeros_like(point)
        for group in members:
            off[group] = point[group] - point[group].mean()
        # P is a projection, so that grad |P x|^2 / 2 = P x.
        return value + strength / 2 * float(off @ off), gradient.numpy() + strength * off

    bounds = Bounds(low.numpy(), high.numpy())
    start = start.clamp(low, high)
    options = {"maxiter": 200, "ftol": SAME_MERIT / 10}
    found = minimize(differentiated, start.numpy(), jac=True, method="L-BFGS-B", bounds=bounds, options=options)
    return torch.from_numpy(found.x).clamp(low, high)


def orthonormal(rows: Tensor) -> Tensor:
    """A basis of the span of rows, shape (k, d) -> (d, r)."""
    _, lengths, basis = torch.linalg.svd(rows, full_matrices=False)
    return basis[lengths > 1e-3 * lengths.max()].T if len(rows) else rows.T


def curvatures(hessian: Tensor, basis: Tensor, rank: int) -> Tensor:
    """Of G in the range of P, shape (rank,), those below 0 as 0.

    The model is too flat where no hypergradient is known: directions of that range outside the basis, shape (d, r), get
    the median of those within (the mean is too strong).
    """
    known = torch.linalg.eigvalsh(basis.T @ hessian @ basis).clamp_min(0)
    unseen = known.median() if len(known) else torch.zeros((), dtype=hessian.dtype)
    return torch.cat([known, unseen.expand(rank - len(known))])
