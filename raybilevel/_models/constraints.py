"""Constraints on reported metrics: where trainings keep them, and an order of trainings that do and do not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from raybilevel._models.feasibility import Feasibility
from raybilevel._models.gaussian_process import FittedGP, fit
from raybilevel._models.shrinkage import penalised
from raybilevel._models.value_function import thinned
from raybilevel.search_state import SearchState, Training

SMALLEST_DEVIATION = 1e-9
"""Of a standardised process: the logarithm of a probability needs a positive one."""


@dataclass(frozen=True)
class MetricProcess:
    """A Gaussian process of asinh(e / s), with e the excess of a metric over its bound and s the mean |e|.

    Like the transform of Eriksson & Poloczek (2021), Scalable Constrained Bayesian Optimization, sign(e) log(1 + |e|),
    it keeps the sign and flattens what is far from the bound. Theirs is not smooth at the bound, where the process is
    to be exact, and the search came less close to optima there. Nor did the median |e|, which shrinks as points gather
    at the bound.
    """

    process: FittedGP

    @classmethod
    def of(cls, x: Tensor, excess: Tensor, categorical: Sequence[int] = ()) -> MetricProcess:
        """x: points of the unit cube, shape (n, d). excess: finite, shape (n,)."""
        scale = excess.abs().mean().item() or 1.0
        return cls(fit(x, torch.asinh(excess / scale), {}, categorical=categorical))

    def log_probability(self, x: Tensor) -> Tensor:
        """Of e <= 0 at points, shape (..., d) -> (...), differentiable."""
        posterior = self.process.model.posterior(x.unsqueeze(-2))
        mean, variance = posterior.mean[..., 0, 0], posterior.variance[..., 0, 0]
        # The bound in units of the process.
        zero = -self.process.shift / self.process.scale
        found: Tensor = torch.special.log_ndtr((zero - mean) / variance.clamp_min(SMALLEST_DEVIATION**2).sqrt())
        return found


@dataclass(frozen=True)
class Feasible:
    """The probability that a training succeeds and keeps every bound, taken to be independent."""

    parts: tuple[Feasibility | MetricProcess, ...]

    def log_probability(self, x: Tensor) -> Tensor:
        """At points, shape (..., d) -> (...), differentiable."""
        return torch.stack([part.log_probability(x) for part in self.parts]).sum(0)


def fit_metrics(
    measured: Sequence[Training], near: Tensor, most: int, unordered: Sequence[int] = ()
) -> tuple[MetricProcess, ...]:
    """A process for each bound; none where there are no constraints.

    near: a point of the unit cube; of more than `most` trainings, those near it are kept, and some others (`thinned`).
    """
    processes = []
    for number in range(max((len(t.excesses) for t in measured), default=0)):
        known = thinned([t for t in measured if math.isfinite(t.excesses[number])], near, most)
        if known:
            x = torch.tensor([t.unit for t in known], dtype=torch.double)
            excess = torch.tensor([t.excesses[number] for t in known], dtype=torch.double)
            processes.append(MetricProcess.of(x, excess, unordered))
    return tuple(processes)


def judged(state: SearchState) -> SearchState:
    """The search with F, seen and predicted, replaced by what it is judged by: with the penalty on groups of
    hyperparameters, and behind all that keep the constraints where a training does not. Itself where there is neither.
    """
    return feasible_first(penalised(state))


def feasible_first(state: SearchState) -> SearchState:
    """The search with every F of a training that breaks a constraint replaced by one above all F seen, the higher the
    further it is beyond its bounds: the order of Deb (2000), An efficient constraint handling method for genetic
    algorithms. The replaced F stay within the range of F above its highest, so that they are of its scale. They have no
    prediction to be compared with: that was of F itself.
    """
    best = state.best
    # The best of all keeps the constraints only if there are any to keep.
    if best is None or not best.excesses:
        return state
    upper = [t.upper_loss for t in state.measured]
    high, width = max(upper), (max(upper) - min(upper)) or 1.0

    def behind(training: Training) -> Training:
        if training.feasible or training.status not in ("done", "stopped"):
            return training
        # From 0 to 1; an unknown excess is taken for an infinite one.
        share = 1 - 1 / (1 + training.excess)
        proposal = replace(training.proposal, predicted_upper_loss=None)
        return replace(training, upper_loss=high + width * share, proposal=proposal)

    return replace(state, trainings=tuple(behind(t) for t in state.trainings))
