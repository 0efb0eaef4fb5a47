"""Trust regions around trained points: how far the models are believed, replayed from what was observed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from raybilevel.search_state import RegionHistory, SearchState, Training, Unit


@dataclass(frozen=True)
class TrustRegion:
    """A box of half-width `radius` in the unit cube around the best training of one region.

    began:    index of the training that began it, its name.
    centre:   index of its best training.
    members:  trainings that it has had results for.
    """

    began: int
    centre: int
    radius: float
    members: int = 0


@dataclass(frozen=True)
class TrustRegionRule:
    """Classical radius control (Conn, Gould & Toint 2000, Algorithm 6.1.1), on F at trained weights.

    The ratio of actual to predicted decrease decides: under `poor` the radius halves, over `good` it doubles.
    """

    initial: float = 0.2
    smallest: float = 4e-3
    largest: float = 0.5
    poor: float = 0.25
    good: float = 0.75

    def replay(self, state: SearchState, starts: tuple[int, ...]) -> tuple[TrustRegion, ...]:
        """The regions begun at the trainings `starts`, after all results so far in their order."""
        return tuple(replayed(self, state.region(start)) for start in starts)

    def update(self, region: TrustRegion, centre: Training, training: Training) -> TrustRegion:
        members = region.members + 1
        predicted = training.proposal.predicted_upper_loss
        # No F to compare: the radius halves as after a poor step.
        if training.status != "done":
            return replace(region, radius=region.radius / 2, members=members)
        decrease = centre.upper_loss - training.upper_loss
        radius = region.radius
        if predicted is not None:
            promised = max(0.0, centre.upper_loss - predicted)
            if decrease <= 0 or decrease < self.poor * promised:
                # Half of the step that failed, if it was shorter than the radius, but at least an eighth of the radius.
                radius = min(radius, max(distance(training.unit, centre.unit), radius / 4)) / 2
            # A step that ended well inside was not held back by the radius.
            elif decrease > self.good * promised and distance(training.unit, centre.unit) > 0.8 * radius:
                radius = min(self.largest, 2 * radius)
        return replace(region, centre=training.index if decrease > 0 else region.centre, radius=radius, members=members)

    def collapsed(self, region: TrustRegion) -> bool:
        return region.radius < self.smallest


@lru_cache(maxsize=4096)
def replayed(rule: TrustRegionRule, history: RegionHistory) -> TrustRegion:
    """A region after all its results. Most have had none since the last step, so what they came to is remembered."""
    first, *members = history.trainings
    region, known = TrustRegion(first.index, first.index, rule.initial), {t.index: t for t in history.trainings}
    for training in members:
        region = rule.update(region, known[region.centre], training)
    return region


def distance(one: Unit, other: Unit) -> float:
    """Largest difference of a coordinate in the unit cube."""
    return max(abs(a - b) for a, b in zip(one, other, strict=True))
