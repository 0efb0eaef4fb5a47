from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from raybilevel.methods._trust_region import TrustRegion, TrustRegionRule
from raybilevel.search_state import Proposal, SearchState, Training

# Small whole numbers beside all others, so that predictions often come true and steps are often as long as can be.
uppers = st.integers(-5, 5).map(float) | st.floats(-1e6, 1e6)
members = st.lists(
    st.builds(
        lambda unit, predicted, upper, status: (Proposal((unit,), "region", 0, predicted), upper, status),
        st.sampled_from([0.0, 0.5, 1.0]) | st.floats(0, 1),
        st.none() | uppers,
        uppers,
        st.sampled_from(["done", "stopped", "failed", "pending"]),
    ),
    max_size=12,
)


def build(parts: list[tuple[Proposal, float, str]]) -> SearchState:
    trainings = [Training(0, Proposal((0.5,), "start"), "done", 0, upper_loss=1.0)]
    for i, (proposal, upper, status) in enumerate(parts, start=1):
        trainings.append(Training(i, proposal, status, -1 if status == "pending" else i, upper_loss=upper))
    return SearchState(tuple(trainings))


@given(parts=members.filter(bool), radius=st.floats(1e-6, 0.5))
def test_one_result_changes_the_radius_within_bounds(parts: list[tuple[Proposal, float, str]], radius: float):
    rule, (centre, training, *_) = TrustRegionRule(), build(parts).trainings
    after = rule.update(TrustRegion(0, 0, radius), centre, training).radius
    assert radius / 8 <= after <= min(rule.largest, 2 * radius)


@given(parts=members)
def test_the_radius_keeps_within_its_bounds_and_the_centre_is_the_best(parts: list[tuple[Proposal, float, str]]):
    rule, state = TrustRegionRule(), build(parts)
    (region,) = rule.replay(state, (0,))
    done = state.done
    assert 0 < region.radius <= rule.largest
    assert region.radius >= rule.initial / 8 ** len(state.told)
    assert state.trainings[region.centre].upper_loss == min(t.upper_loss for t in done)
    assert region.members == len(state.told) - 1


@given(parts=members, data=st.data())
def test_replay_is_independent_of_what_is_pending(parts: list[tuple[Proposal, float, str]], data: st.DataObject):
    rule, state = TrustRegionRule(), build(parts)
    waiting = data.draw(st.lists(st.sampled_from([None, 0, 99]), max_size=3))
    more = state
    for region in waiting:
        more = more.add(Proposal((0.1,), "region", region, -5.0))
    assert rule.replay(more, (0,)) == rule.replay(state, (0,))


@given(parts=members)
def test_replay_goes_on_where_it_stood(parts: list[tuple[Proposal, float, str]]):
    """A region after all results is the region after all but the last, updated with the last."""
    rule, state = TrustRegionRule(), build(parts)
    told = state.told
    if len(told) < 2:
        return
    last = told[-1]
    before = state.change(last.index, status="pending", finished=-1)
    (region,) = rule.replay(before, (0,))
    assert rule.replay(state, (0,)) == (rule.update(region, state.trainings[region.centre], last),)
