from __future__ import annotations

import math
from dataclasses import replace

import pytest

from raybilevel._models.trust import Promise, promises, steps_taken, trust
from raybilevel.search_state import Proposal, SearchState, Training


def descent(factor: float = 1.0) -> SearchState:
    """F = x^2 followed by `factor` times its derivative from 0.9 in steps of 0.2."""
    made = []
    for i, x in enumerate((0.9, 0.7, 0.5, 0.3, 0.1)):
        proposal = Proposal((x,), "region" if i else "start", 0 if i else None)
        made.append(Training(i, proposal, "done", i, 0.0, x * x, (0.0,), 10.0, (factor * 2 * x,)))
    return SearchState(tuple(made))


@pytest.mark.parametrize("factor", [1.0, 4.0, -1.0])
def test_the_bend_of_a_quadratic_is_no_error_of_its_derivatives(factor: float):
    known = promises(descent(factor))
    assert [promise.kept for promise in known] == pytest.approx([1 / factor] * 4)


def test_trust_is_the_median_and_one_overshoot_does_not_decide():
    assert trust(()) == 1.0
    assert trust(promises(descent(4.0))) == pytest.approx(0.25)
    assert trust(promises(descent(0.5))) == 1.0
    assert trust(promises(descent(-1.0))) == 0.0
    overshoot = descent().change(2, upper_loss=17.0)
    assert trust(promises(overshoot)) == pytest.approx(1.0)


def test_steps_start_at_the_best_of_their_region_before():
    state = descent().change(2, upper_loss=9.0)
    assert [(start.index, end.index) for start, end in steps_taken(state)] == [(0, 1), (1, 2), (1, 3), (3, 4)]


def test_a_step_along_an_unknown_derivative_promises_nothing():
    start, end = (
        Training(i, Proposal(unit, "start"), "done", i, 0.0, 1.0 - i, hypergradient=(1.0, math.nan))
        for i, unit in enumerate(((0.5, 0.5), (0.3, 0.5)))
    )
    promise = Promise.of(start, end)
    assert promise is not None and promise.kept == pytest.approx(5.0)
    assert Promise.of(start, replace(end, proposal=Proposal((0.3, 0.4), "start"))) is None
    assert Promise.of(start, replace(end, hypergradient=())) is None
    assert Promise.of(start, replace(end, proposal=start.proposal, upper_loss=start.upper_loss)) is None


@pytest.mark.parametrize("factor", [0.0, 0.01])
def test_hypergradients_that_say_flat_where_f_is_not_are_not_trusted(factor: float):
    known = promises(descent(factor))
    assert len(known) == 4 and all(promise.kept > 90 for promise in known)
    assert trust(known) == 0.0


def test_small_changes_do_not_decide():
    noise = tuple(Promise(1e-6, -3e-6) for _ in range(9))
    assert trust((*promises(descent()), *noise)) == pytest.approx(1.0)
