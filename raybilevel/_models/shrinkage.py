"""A penalty on how far hyperparameters of a kind differ, and F as a likelihood.

With n validation examples, exp(-n G) is the likelihood of the hyperparameters x: G = F where F is a mean negative
log-likelihood, G = log(F) / 2 where it is a mean squared error (the variance at its own best). With P the projection
off the mean of each group, what the search minimises is

    G(x) + (tau / 2) |P x|^2

in the unit cube. Where a search compares values of F, its penalised form in the unit of F stands for it: F + (tau / 2)
|P x|^2 and F exp(tau |P x|^2) have the same order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from raybilevel.search_state import Likelihood, SearchState, Shrinkage, Training, Unit

Groups = Sequence[Sequence[int]]
SMALLEST_ERROR = 1e-300
AT_BOUND = 1e-6
"""Distance from a bound of the unit cube up to which a coordinate is at it."""


def off_mean(x: Tensor, groups: Groups) -> Tensor:
    """P x: each group less its mean, 0 elsewhere, shape (..., d)."""
    result = torch.zeros_like(x)
    for group in groups:
        members = list(group)
        result[..., members] = x[..., members] - x[..., members].mean(-1, keepdim=True)
    return result


def off_bounds(x: Tensor, groups: Groups) -> tuple[list[int], Groups]:
    """The coordinates of x, shape (d,), that are at no bound of the unit cube, and the groups of two and more among
    them, whose members are places in that list."""
    free = [j for j, at in enumerate(x.tolist()) if AT_BOUND < at < 1 - AT_BOUND]
    places = {j: place for place, j in enumerate(free)}
    left = (tuple(places[j] for j in group if j in places) for group in groups)
    return free, tuple(group for group in left if len(group) > 1)


def negative_log_likelihood(upper: Tensor, likelihood: Likelihood) -> Tensor:
    """G, per example."""
    return upper if likelihood == "log_likelihood" else upper.clamp_min(SMALLEST_ERROR).log() / 2


@dataclass(frozen=True)
class GroupPenalty:
    """G + (strength / 2) |P x|^2."""

    groups: Groups
    likelihood: Likelihood
    strength: float

    @classmethod
    def of(cls, shrinkage: Shrinkage) -> GroupPenalty:
        return cls(shrinkage.groups, shrinkage.likelihood, shrinkage.strength)

    def __call__(self, upper: Tensor, x: Tensor) -> Tensor:
        """At values of F, shape (...), and points, shape (..., d)."""
        return negative_log_likelihood(upper, self.likelihood) + self.strength / 2 * self._differing(x)

    def in_units_of_upper(self, upper: Tensor, x: Tensor) -> Tensor:
        """The same in the unit of F; a monotone function of it."""
        differing = self.strength * self._differing(x)
        return upper + differing / 2 if self.likelihood == "log_likelihood" else upper * differing.exp()

    def _differing(self, x: Tensor) -> Tensor:
        return off_mean(x, self.groups).square().sum(-1)


def penalised(state: SearchState) -> SearchState:
    """The search with F, seen and predicted, replaced by its penalised form, with the strength in use; the search
    itself where there is none."""
    shrinkage = state.shrinkage
    if shrinkage is None or not shrinkage.applied or shrinkage.strength == 0:
        return state
    penalty = GroupPenalty.of(shrinkage)
    x = torch.tensor([t.unit for t in state.trainings], dtype=torch.double)
    seen = torch.tensor([[t.upper_loss, _predicted(t)] for t in state.trainings], dtype=torch.double)
    # One x for two values of F, seen and predicted: (n, d) -> (n, 2, d).
    merits = penalty.in_units_of_upper(seen, x.unsqueeze(1).expand(-1, 2, -1)).tolist()
    trainings = tuple(
        replace(
            t,
            upper_loss=upper,
            proposal=t.proposal
            if t.proposal.predicted_upper_loss is None
            else replace(t.proposal, predicted_upper_loss=predicted),
        )
        for t, (upper, predicted) in zip(state.trainings, merits, strict=True)
    )
    return replace(state, trainings=trainings)


def expected_loss(shrinkage: Shrinkage, unit: Unit, upper: float) -> float:
    """What F is to be expected to be on new data at a point of the unit cube where it is `upper` on the examples.

    With a quadratic G, Gaussian noise of the examples and the prior of the groups, G on new data exceeds that on the
    examples by

        s / n + tau x_tau' P (x - x_tau)

    with s the hyperparameters that the examples determine. At x_tau this is the optimism of a maximum of likelihood
    (Akaike 1974). One at a bound stays there whatever the chance in the examples, and does not count: the degrees of
    freedom of a minimum on a polyhedron are those of its face (Meyer & Woodroofe 2000). The second term is
    -grad G(x_tau) . (x - x_tau): what has been gained beyond x_tau, to first order, is chance, and is lost again on new
    data.
    """
    mode, x = (torch.tensor(point, dtype=torch.double) for point in (shrinkage.mode, unit))
    beyond = shrinkage.strength * (off_mean(mode, shrinkage.groups) @ (x - mode)).item()
    # In the unit of G. With G = log(F) / 2 that is a factor exp(2 optimism) of F.
    optimism = adapted(shrinkage) / shrinkage.examples + beyond
    return raised(shrinkage, upper, optimism)


def expected_at_spread(shrinkage: Shrinkage, upper: float, spread: float) -> float:
    """The same for differences within groups that are `spread` times those of the result, where F is `upper`.

    The result follows the chance in the examples, and a point on the way to the means of its groups by so much less. So
    what groups add to the optimism, sum_j e_j / (e_j + tau) / n, is `spread` times as large (a covariance penalty,
    Efron 2004). That of other hyperparameters is left out, as it is the same at every spread.
    """
    free, groups = off_bounds(torch.tensor(shrinkage.mode, dtype=torch.double), shrinkage.groups)
    others = len(free) - sum(len(group) - 1 for group in groups)
    optimism = spread * max(0.0, adapted(shrinkage) - others) / shrinkage.examples
    return raised(shrinkage, upper, optimism)


def adapted(shrinkage: Shrinkage) -> float:
    """s of `expected_loss`."""
    return shrinkage.supported if shrinkage.adapted is None else shrinkage.adapted


def raised(shrinkage: Shrinkage, upper: float, optimism: float) -> float:
    """F with the optimism of its negative log-likelihood an example added."""
    return upper + optimism if shrinkage.likelihood == "log_likelihood" else upper * math.exp(2 * optimism)


def _predicted(training: Training) -> float:
    predicted = training.proposal.predicted_upper_loss
    return float("nan") if predicted is None else predicted
