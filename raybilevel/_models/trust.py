"""How far hypergradients are to be trusted: the changes of F that they promised against those that were trained."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import Self

from raybilevel.search_state import SearchState, Training

TOO_SHORT = 10.0
"""Trained over promised changes from which on hypergradients say nothing."""
SMALLEST = 1e-3
"""Changes of F below this share of the largest are left out: near the end of a search they are noise."""
AT_FIRST = 2
"""Steps that are taken to have kept their promises before any is known to have."""


@dataclass(frozen=True)
class Promise:
    """Of a step from one training to another: the change of F by the hypergradients at both, and the one trained.

    The mean of the derivatives at both ends times the step is exact where F is quadratic along it, so that the bend of
    F is no error of the hypergradients.
    """

    promised: float
    seen: float

    @classmethod
    def of(cls, start: Training, end: Training) -> Self | None:
        """None where a derivative along the step is not known, or nothing was promised and nothing came."""
        if not start.hypergradient or not end.hypergradient:
            return None
        promised = 0.0
        for a, b, g, h in zip(start.unit, end.unit, start.hypergradient, end.hypergradient, strict=True):
            # An unknown derivative is NaN, and so would be its product with a step of 0.
            promised += (g + h) / 2 * (b - a) if b != a else 0.0
        seen = end.upper_loss - start.upper_loss
        return None if math.isnan(promised) or promised == seen == 0 else cls(promised, seen)

    @property
    def size(self) -> float:
        """Of the change, promised or trained."""
        return max(abs(self.promised), abs(self.seen))

    @property
    def kept(self) -> float:
        """The share that came true; negative where F went the other way, infinite where nothing was promised."""
        return self.seen / self.promised if self.promised else math.inf


def steps_taken(state: SearchState) -> Iterator[tuple[Training, Training]]:
    """Each training of a trust region, after the best one of that region before it."""
    best: dict[int, Training] = {}
    for training in state.done:
        region = training.proposal.region
        if region is None:
            continue
        centre = best.get(region, state.trainings[region])
        if centre.index != training.index and centre.status == "done":
            yield centre, training
        # Of equals the earlier one, as `min` takes.
        best[region] = min(centre, training, key=lambda t: t.upper_loss)


def promises(state: SearchState) -> tuple[Promise, ...]:
    """Of all steps with hypergradients at both ends."""
    found = (Promise.of(start, end) for start, end in steps_taken(state))
    return tuple(promise for promise in found if promise is not None)


def trust(known: tuple[Promise, ...]) -> float:
    """The factor by which hypergradients are multiplied, from 0 to 1: the median of the shares that came true.

    It is the regression of seen on promised changes in the L1 norm of relative errors, which one overshoot does not
    decide. Hypergradients that are far too short say that F is flat where it is not, and are not trusted at all.
    """
    largest = max((promise.size for promise in known), default=0.0)
    kept = median([1.0] * AT_FIRST + [promise.kept for promise in known if promise.size >= SMALLEST * largest])
    return 0.0 if kept > TOO_SHORT else min(1.0, max(0.0, kept))
