"""What the search proposes depends neither on the unit of F nor on its zero."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

from raybilevel.methods import Default
from raybilevel.methods._base import UpperStep
from raybilevel.search_state import Proposal, SearchState, Training
from raybilevel.space import sobol_points
from tests.problems_for_tests import Ridge, unit_box

D, COUNT = 2, 7
METHOD = Default()


def searched(scale: float, shift: float, known: int, equal: bool = False) -> SearchState:
    """A search of scale F + shift, whose last trainings are of one region; `known` of its hypergradients are.

    equal: F is the same at all points.
    """
    trainings = []
    for i, unit in enumerate(sobol_points(D, COUNT, 1)):
        away = unit - torch.tensor([0.3, 0.6], dtype=torch.double)
        upper = 0.0 if equal else (away.square().sum() + 0.5 * away[0] ** 3).item()
        slope = scale * (2 * away + torch.tensor([1.5 * away[0] ** 2, 0.0]))
        proposal = Proposal(tuple(unit.tolist()), "start" if i < 4 else "region", None if i < 4 else 0,
                            None if i < 4 else scale * upper * 0.7 + shift)  # fmt: skip
        trainings.append(Training(
            i, proposal, "done", i, 1.0 + i / 7, scale * upper + shift, (0.1, 0.2), 10.0,
            tuple(slope.tolist()) if i < known else (),
        ))  # fmt: skip
    return SearchState(tuple(trainings))


def proposed(state: SearchState, origin: str) -> tuple[float, ...]:
    step = METHOD.plan(state, (), 1, 3)
    assert step is not None
    step = UpperStep(step.number, origin, step.centre, state, step.seed, region=step.region, radius=step.radius)
    result = METHOD.run(Ridge(), unit_box(D), {}, step, lambda index: {})
    assert result.proposal is not None
    return (step.radius, *result.proposal.unit)


@lru_cache
def as_it_is(known: int, origin: str, equal: bool = False) -> tuple[float, ...]:
    return proposed(searched(1.0, 0.0, known, equal), origin)


@pytest.mark.parametrize(("scale", "shift"), [(1e-14, 0.0), (1.0, 1e4)])
@pytest.mark.parametrize(("known", "origin"), [(COUNT, "region"), (0, "global")])
def test_proposals_do_not_change_with_the_scale_and_shift_of_f(scale: float, shift: float, known: int, origin: str):
    # F + 1e4 is rounded to 2e-12, which the fit of the model amplifies
    assert proposed(searched(scale, shift, known), origin) == pytest.approx(as_it_is(known, origin), abs=2e-3)


def test_where_all_f_are_equal_hypergradients_give_the_scale():
    found = proposed(searched(1e-14, 0.0, COUNT, equal=True), "region")
    assert found == pytest.approx(as_it_is(COUNT, "region", True), abs=1e-3)
