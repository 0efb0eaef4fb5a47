"""Where to train next: a Gaussian process of F(x, y*(x)) with hypergradients, and BoTorch acquisitions on it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from botorch.acquisition import AcquisitionFunction
from botorch.acquisition.analytic import LogExpectedImprovement, UpperConfidenceBound
from botorch.exceptions.warnings import BotorchWarning
from botorch.optim import optimize_acqf
from torch import Tensor

from raybilevel._models import leave_one_out
from raybilevel._models.constraints import Feasible
from raybilevel._models.discrete import NONE, AtRest, Levels, all_active, promising, snapped, widened, with_setting
from raybilevel._models.gaussian_process import FittedGP, differs, fit
from raybilevel._models.one_length import fit_one_length
from raybilevel._models.shrinkage import GroupPenalty
from raybilevel._models.value_function import nearest, thinned
from raybilevel.search_state import Training, or_zero
from raybilevel.space import sobol_points

RAW, RAW_BY_VALUES = 64, 512
"""Scrambled Sobol points from the best of which an acquisition is maximised, and that of a search by values alone."""
ROUNDS = 2
"""Of settings of the discrete coordinates that are tried in one maximisation."""


LEAST_TRUST = 0.05
"""Below it hypergradients would say that F is flat."""
FEWEST_GRADIENTS, MOST_POINTS = 8, 30
"""With room for fewer gradients than these, all of the nearest points are kept, so many, with one length scale."""
ENOUGH_TO_CONTRADICT = 6
POOR = 0.7
"""Error of left-out values, in standard deviations of all, from which on gradients may contradict them."""
CLEARLY_BETTER = 0.75
MOST_LOWEST = 8


@dataclass(frozen=True)
class Warp:
    """z = log(F - low + spread): bad regions are flattened, whatever the shift and scale of F.

    low: the smallest F seen; spread: the median's distance from it, or else that of the mean.
    """

    low: float
    spread: float

    @classmethod
    def of(cls, upper: Tensor, steepest: float = 0.0) -> Warp:
        """steepest: the largest derivative of F that is known, which stands for the spread where all F are equal."""
        low = upper.min().item()
        # The lower quartile in place of the median was better on ridge regression and worse on digits (method.md).
        spreads = (upper.median().item() - low, upper.mean().item() - low)
        # The mean where half of F or more are the lowest. The logarithm needs a positive argument in any case.
        return cls(low, next((spread for spread in spreads if differs(spread, low)), steepest or 1.0))

    def __call__(self, upper: Tensor) -> Tensor:
        return torch.log(upper - self.low + self.spread)

    def slope(self, upper: Tensor) -> Tensor:
        return 1 / (upper - self.low + self.spread)

    def inverse(self, z: float) -> float:
        return math.exp(z) + self.low - self.spread


@dataclass(frozen=True)
class UpperModel:
    """The posterior of warped F at trained weights, conditioned on pending points at their own mean.

    best: the lowest F of trainings that keep the constraints, in the units of the process; None where none does.
    """

    process: FittedGP
    warp: Warp
    best: float | None

    def mean(self, unit: Tensor) -> float:
        """F expected at a point of the unit cube, shape (d,)."""
        return self.warp.inverse(self.process.mean(unit).item())

    def gain(self, unit: Tensor) -> float:
        """The share of a deviation of F there from its mean that the model would believe, shape (d,)."""
        with torch.no_grad():
            variance: float = self.process.model.posterior(unit.unsqueeze(0)).variance.item()
        return variance / (variance + self.process.model.value_noise)

    def lowest(
        self, trainings: Sequence[Training], penalty: GroupPenalty | None = None
    ) -> tuple[tuple[int, float], ...]:
        """Index and expected F of the trainings at which that is lowest, with a penalty if there is one, and of those
        with the lowest F seen, with and without it."""
        x = torch.tensor([t.unit for t in trainings], dtype=torch.double)
        with torch.no_grad():
            z = self.process.shift + self.process.scale * self.process.model.posterior(x.unsqueeze(1)).mean.flatten()
        means = z.exp() + self.warp.low - self.warp.spread
        merit = means if penalty is None else penalty.in_units_of_upper(means, x)
        upper = torch.tensor([t.upper_loss for t in trainings], dtype=torch.double)
        seen = int((upper if penalty is None else penalty.in_units_of_upper(upper, x)).argmin())
        chosen = sorted({int(upper.argmin()), seen, *merit.argsort(stable=True)[:MOST_LOWEST].tolist()})
        return tuple((trainings[i].index, means[i].item()) for i in chosen)


def fit_upper_model(
    trainings: Sequence[Training],
    pending: Sequence[Tensor],
    near: Tensor,
    max_rows: int,
    unordered: Sequence[int] = (),
    trust: float = 1.0,
) -> UpperModel:
    """The model of measured trainings; where rows run out, hypergradients nearest to `near` are kept, and with them at
    most half of the rows are values (`thinned`).

    In many dimensions so few would be kept that one length scale for all coordinates, with all hypergradients of the
    nearest trainings, is better (`one_length`).

    unordered: coordinates of choices without an order.
    trust:     what hypergradients are multiplied by; with too little they are left out.
    """
    feasible = [t.upper_loss for t in trainings if t.feasible]
    # Of all trainings, before rows are thinned: `low` is the lowest F of all.
    steepest = max((abs(or_zero(g)) for t in trainings for g in t.hypergradient or ()), default=0.0)
    warp = Warp.of(torch.tensor([t.upper_loss for t in trainings], dtype=torch.double), steepest)
    with_gradients = trust >= LEAST_TRUST and any(t.hypergradient for t in trainings)
    # A partial gradient has another covariance along each coordinate.
    whole = not any(math.isnan(g) for t in trainings for g in t.hypergradient or ())
    many = with_gradients and whole and not unordered and max_rows // len(near) < FEWEST_GRADIENTS
    trainings = thinned(trainings, near, max_rows // 2 if with_gradients else max_rows)
    if many:
        points = torch.tensor([t.unit for t in trainings], dtype=torch.double)
        trainings = [trainings[i] for i in nearest(points, near, MOST_POINTS)]
    x = torch.tensor([t.unit for t in trainings], dtype=torch.double)
    upper = torch.tensor([t.upper_loss for t in trainings], dtype=torch.double)
    slope = warp.slope(upper)
    known = [i for i, t in enumerate(trainings) if t.hypergradient and trust >= LEAST_TRUST]
    # A gradient takes d rows, but with one length scale.
    most = len(known) if many else (max_rows - len(x)) // x.shape[1]
    kept = [known[i] for i in nearest(x[known], near, most)] if known else []
    # The chain rule: dz/dx = z'(F) dF/dx.
    gradients = {i: trust * slope[i] * torch.tensor(trainings[i].hypergradient, dtype=torch.double) for i in kept}
    if many and gradients:
        # Left-out values are not asked: so far apart, gradients at other points say little of them.
        process = fit_one_length(x, warp(upper), gradients)
    else:
        process = fitted_to_both(x, warp(upper), gradients, unordered)
    if pending:
        # Kriging believer (Ginsbourger et al. 2010): a pending point counts as observed at its posterior mean.
        points = torch.stack(list(pending))
        believed = process.model.conditioned.means(points)
        process.model.observe(points, believed)
    # In the units of the process, whose posterior the acquisitions see.
    best = None
    if feasible:
        best = (warp(torch.tensor(min(feasible), dtype=torch.double)) - process.shift).item() / process.scale
    return UpperModel(process, warp, best)


def fitted_to_both(x: Tensor, z: Tensor, gradients: Mapping[int, Tensor], unordered: Sequence[int]) -> FittedGP:
    """The process of values and gradients; of values alone where that predicts left-out values clearly better."""
    process = fit(x, z, gradients, categorical=unordered)
    # A second fit is made only where the first predicts values badly: it costs as much again.
    if gradients and len(x) >= ENOUGH_TO_CONTRADICT and (error := typical_error(process)) > POOR:
        by_values = fit(x, z, {}, categorical=unordered)
        if typical_error(by_values) < CLEARLY_BETTER * error:
            return by_values
    return process


def typical_error(process: FittedGP) -> float:
    """Root mean square of the errors of left-out values, in their standard deviations."""
    return leave_one_out.errors(process).square().mean().sqrt().item()


def minimise_in_box(
    model: UpperModel,
    low: Tensor,
    high: Tensor,
    starts: Sequence[Tensor],
    beta: float,
    seed: int,
    penalty: GroupPenalty | None = None,
    discrete: Levels = NONE,
    at_rest: AtRest = all_active,
    feasibility: Feasible | None = None,
) -> Tensor:
    """The point of a box with the lowest mean - sqrt(beta) * deviation, with a penalty if there is one, shape (d,).

    feasibility: of trainings, where some have failed or there are constraints; the point then has the largest product
        of its probability and of what that bound falls to below its value at the first of `starts`.
    """
    acquisition: AcquisitionFunction = UpperConfidenceBound(model.process.model, beta=beta, maximize=False)
    if penalty is not None:
        acquisition = PenalisedConfidenceBound(model, penalty, beta)
    if feasibility is not None:
        acquisition = FeasibleDecrease(acquisition, feasibility, starts[0])
    return maximise(acquisition, low, high, starts, seed, discrete=discrete, at_rest=at_rest)


class PenalisedConfidenceBound(AcquisitionFunction):  # type: ignore[misc]
    """-(G + (strength / 2) |P x|^2) at the lower confidence bound of F; see `generalisation`."""

    def __init__(self, model: UpperModel, penalty: GroupPenalty, beta: float) -> None:
        super().__init__(model.process.model)
        self.upper, self.penalty, self.beta = model, penalty, beta

    def forward(self, X: Tensor) -> Tensor:
        process, warp = self.upper.process, self.upper.warp
        if self.beta > 0:
            mean, covariance = process.model.conditioned.moments(X)
            # The root has no finite gradient at a variance of 0.
            bound = mean[..., 0] - math.sqrt(self.beta) * covariance[..., 0, 0].clamp_min(1e-18).sqrt()
        else:
            bound = process.model.conditioned.means(X)[..., 0]
        # The warp is monotone, so the bound of z is warped back to that of F.
        upper = torch.exp(process.shift + process.scale * bound) + warp.low - warp.spread
        return -self.penalty(upper, X.squeeze(-2))


class FeasibleDecrease(AcquisitionFunction):  # type: ignore[misc]
    """p(x) (a(x) - a(centre)) of an acquisition a: what a training that may fail is expected to gain.

    The expectation of Gardner et al. (2014), Bayesian Optimization with Inequality Constraints, with the decrease of
    the model in place of expected improvement.
    """

    def __init__(self, acquisition: AcquisitionFunction, feasibility: Feasible, centre: Tensor) -> None:
        super().__init__(acquisition.model)
        self.acquisition, self.feasibility = acquisition, feasibility
        with torch.no_grad():
            self.at_centre = acquisition(centre[None, None]).item()

    def forward(self, X: Tensor) -> Tensor:
        # Where this is negative a low p makes the product larger, but the centre, which is a start, has 0.
        gained: Tensor = self.acquisition(X) - self.at_centre
        p = self.feasibility.log_probability(X.squeeze(-2)).exp()
        # Where all lose, as in a cell of a grid without the centre, a likely failure must not look better.
        return torch.where(gained > 0, p * gained, (2 - p) * gained)


Factor = Callable[[Tensor], Tensor]
"""The logarithm of something that multiplies an expected improvement, at points, shape (..., d) -> (...)."""


class WeightedImprovement(LogExpectedImprovement):  # type: ignore[misc]
    """Expected improvement times some factors, as a logarithm. One may be the probability of a feasible training
    (Gardner et al. 2014)."""

    factors: Sequence[Factor] = ()

    def forward(self, X: Tensor) -> Tensor:
        improvement: Tensor = super().forward(X)
        for factor in self.factors:
            improvement = improvement + factor(X.squeeze(-2))
        return improvement


def expected_improvement(
    model: UpperModel,
    dimension: int,
    starts: Sequence[Tensor],
    seed: int,
    discrete: Levels = NONE,
    at_rest: AtRest = all_active,
    factors: Sequence[Factor] = (),
) -> Tensor:
    """The point of the unit cube with the largest (log) expected improvement over the incumbent, shape (d,).

    The model has an incumbent, i.e. a `best`.
    """
    acquisition = WeightedImprovement(model.process.model, best_f=model.best, maximize=False)
    acquisition.factors = factors
    low, high = torch.zeros(dimension).double(), torch.ones(dimension).double()
    # By values alone it has a hill at each place that is little known.
    raw = RAW if model.process.model.has_derivatives else RAW_BY_VALUES
    return maximise(acquisition, low, high, starts, seed, discrete=discrete, at_rest=at_rest, raw_points=raw)


class LogFeasibility(AcquisitionFunction):  # type: ignore[misc]
    """log p of a feasible training."""

    def __init__(self, model: UpperModel, feasibility: Feasible) -> None:
        super().__init__(model.process.model)
        self.feasibility = feasibility

    def forward(self, X: Tensor) -> Tensor:
        return self.feasibility.log_probability(X.squeeze(-2))


def most_feasible(
    model: UpperModel,
    feasibility: Feasible,
    low: Tensor,
    high: Tensor,
    starts: Sequence[Tensor],
    seed: int,
    discrete: Levels = NONE,
    at_rest: AtRest = all_active,
) -> Tensor:
    """The point of a box where a training is most likely to be feasible, shape (d,)."""
    acquisition = LogFeasibility(model, feasibility)
    return maximise(acquisition, low, high, starts, seed, discrete=discrete, at_rest=at_rest)


def maximise(
    acquisition: AcquisitionFunction,
    low: Tensor,
    high: Tensor,
    starts: Sequence[Tensor],
    seed: int,
    restarts: int = 4,
    discrete: Levels = NONE,
    at_rest: AtRest = all_active,
    raw_points: int = RAW,
) -> Tensor:
    """Multi-start L-BFGS-B in a box, from `starts` and the best of some scrambled Sobol points.

    discrete: coordinates that have a few values. They are free of the box. The continuous ones are optimised at the
        most promising settings of the others, then at the neighbours of the best.
    at_rest:  of a conditional space: at a setting of the discrete coordinates, those that are not active stay at rest.
    """
    low, high = widened(low, high, discrete)
    raw, _ = at_rest(snapped(low + sobol_points(len(low), raw_points, seed) * (high - low), discrete))
    with torch.no_grad():
        # Stable: points of equal acquisition, e.g. far from all data, keep their order on every machine.
        order = acquisition(raw.unsqueeze(1)).argsort(descending=True, stable=True)
    chosen = [*(at_rest(snapped(start, discrete))[0].clamp(low, high) for start in starts), *raw[order[:restarts]]]
    if not discrete:
        return ascended(acquisition, low, high, chosen)
    tried: dict[tuple[tuple[int, float], ...], tuple[float, Tensor]] = {}
    points = torch.stack(chosen)
    for _ in range(ROUNDS):
        for candidate in promising(acquisition, points, discrete, at_rest):
            _, resting = at_rest(candidate)
            fixed = {j: candidate[j].item() for j in sorted({*discrete, *resting.nonzero().flatten().tolist()})}
            setting = tuple(fixed.items())
            if setting in tried:
                continue
            point = candidate
            # Else every coordinate is fixed, and nothing is left to optimise.
            if len(fixed) < len(low):
                others = [with_setting(start, fixed) for start in chosen[:2]]
                point = ascended(acquisition, low, high, [candidate, *others], fixed)
            with torch.no_grad():
                tried[setting] = acquisition(point[None, None]).item(), point
        # The next round starts from the best setting, and looks at its neighbours.
        points = max(tried.values(), key=lambda found: found[0])[1].unsqueeze(0)
    return points[0]


def ascended(
    acquisition: AcquisitionFunction,
    low: Tensor,
    high: Tensor,
    starts: Sequence[Tensor],
    fixed: Mapping[int, float] | None = None,
) -> Tensor:
    """The best of L-BFGS-B from each start, shape (d,); `fixed` coordinates keep their values, in the box or not."""
    fixed, low, high = dict(fixed or {}), low.clone(), high.clone()
    for coordinate, value in fixed.items():
        # One at rest may lie outside of the box, where BoTorch refuses a start.
        low[coordinate], high[coordinate] = low[coordinate].clamp_max(value), high[coordinate].clamp_min(value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BotorchWarning)
        # BoTorch warns so where L-BFGS-B did not succeed.
        warnings.simplefilter("ignore", RuntimeWarning)
        found, _ = optimize_acqf(
            acquisition,
            bounds=torch.stack([low, high]),
            q=1,
            num_restarts=len(starts),
            # At another setting a coordinate may begin where it was at rest, outside of the box.
            batch_initial_conditions=torch.stack(list(starts)).clamp(low, high).unsqueeze(1),
            fixed_features=fixed or None,
            options={"maxiter": 60},
        )
    point: Tensor = found[0].detach().clamp(low, high)
    return point
