from __future__ import annotations

import pytest

from raybilevel.methods._trust_region import TrustRegion, TrustRegionRule
from raybilevel.search_state import Proposal, SearchState, Status, Training

RULE = TrustRegionRule()


def training(
    index: int,
    upper: float,
    unit: float = 0.5,
    predicted: float | None = None,
    region: int | None = 0,
    status: Status = "done",
    finished: int | None = None,
) -> Training:
    proposal = Proposal((unit,), "region", region, predicted_upper_loss=predicted)
    return Training(index, proposal, status, index if finished is None else finished, upper_loss=upper)


CENTRE = training(0, upper=1.0)
REGION = TrustRegion(began=0, centre=0, radius=0.2)


@pytest.mark.parametrize(
    ("upper", "unit", "predicted", "centre", "radius"),
    [
        # predicted a decrease of 0.4; the step is as long as the radius
        (0.6, 0.7, 0.6, 1, 0.4),  # all of it came: the radius doubles
        (0.6, 0.65, 0.6, 1, 0.2),  # but not after a step that the radius did not limit
        (0.8, 0.7, 0.6, 1, 0.2),  # half of it came
        (0.95, 0.7, 0.6, 1, 0.1),  # an eighth of it
        (1.1, 0.7, 0.6, 0, 0.1),  # none
        (1.1, 0.6, 0.6, 0, 0.05),  # none, of a short step: half its length
        (1.1, 0.51, 0.6, 0, 0.025),  # but no more than to an eighth
        (0.9, 0.7, None, 1, 0.2),  # nothing was predicted
        (1.1, 0.7, None, 0, 0.2),
    ],
)
def test_the_rule_by_hand(upper: float, unit: float, predicted: float | None, centre: int, radius: float):
    after = RULE.update(REGION, CENTRE, training(1, upper, unit, predicted))
    assert (after.began, after.centre, after.members) == (0, centre, 1)
    assert after.radius == pytest.approx(radius, rel=1e-12)


@pytest.mark.parametrize("status", ["failed", "stopped"])
def test_a_training_that_did_not_end_well_halves_the_radius(status: Status):
    after = RULE.update(REGION, CENTRE, training(1, 0.1, status=status))
    assert (after.centre, after.radius, after.members) == (0, 0.1, 1)


def test_the_radius_does_not_exceed_the_largest():
    wide = TrustRegion(0, 0, 0.4)
    assert RULE.update(wide, CENTRE, training(1, 0.0, 0.9, predicted=0.0)).radius == 0.5


def test_the_longest_coordinate_is_the_length_of_a_step():
    centre = Training(0, Proposal((0.5, 0.5), "start"), "done", 0, upper_loss=1.0)
    moved = Training(1, Proposal((0.51, 0.3), "region", 0, predicted_upper_loss=0.5), "done", 1, upper_loss=0.5)
    assert RULE.update(REGION, centre, moved).radius == pytest.approx(0.4)


def test_a_region_collapses_below_the_smallest_radius():
    assert not RULE.collapsed(TrustRegion(0, 0, 4e-3))
    assert RULE.collapsed(TrustRegion(0, 0, 3.9e-3))


def state(*trainings: Training) -> SearchState:
    return SearchState(trainings)


def test_replay_follows_the_order_of_results():
    # 2 came before 1: against the centre 0 both are good; against 2, training 1 is not
    early = state(CENTRE, training(1, 0.9, 0.7, 0.6, finished=2), training(2, 0.6, 0.7, 0.6, finished=1))
    (region,) = RULE.replay(early, (0,))
    assert (region.centre, region.members) == (2, 2)
    late = state(CENTRE, training(1, 0.9, 0.7, 0.6, finished=1), training(2, 0.6, 0.7, 0.6, finished=2))
    assert RULE.replay(late, (0,))[0].radius != region.radius


def test_each_training_counts_in_its_own_region():
    other = training(1, 2.0, 0.1, region=None)
    regions = RULE.replay(
        state(CENTRE, other, training(2, 0.9, 0.7, 0.6, region=1), training(3, 9.0, region=None)), (0, 1)
    )
    assert [(r.began, r.centre, r.members) for r in regions] == [(0, 0, 0), (1, 2, 1)]


def test_replay_does_not_see_pending_trainings():
    told = (CENTRE, training(1, 0.6, 0.7, 0.6))
    waiting = training(2, float("nan"), 0.3, 0.1, status="pending", finished=-1)
    assert RULE.replay(state(*told, waiting), (0,)) == RULE.replay(state(*told), (0,))


def test_a_region_without_results_is_as_it_began():
    assert RULE.replay(state(CENTRE), (0,)) == (TrustRegion(0, 0, 0.2),)
    assert RULE.replay(state(CENTRE), ()) == ()
