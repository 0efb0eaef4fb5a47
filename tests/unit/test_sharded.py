"""Several searches with a part of the box each, in simulated time."""

from __future__ import annotations

import math

import pytest

from benchmarks.sharded import Driver, parts_of, run, take
from raybilevel.methods._default import Default
from raybilevel.problems.synthetic import SeveralOptima
from raybilevel.search._optimizer import BilevelOptimizer
from raybilevel.space import Parameter, Space, flatten, nest


def test_parts_make_up_the_box() -> None:
    box = Space((Parameter(("a",), 1e-4, 1e4, log=True), Parameter(("b",), 0.0, 3.0)))
    parts = parts_of(box, 8)
    assert len(set(parts)) == 8
    assert sum(math.prod(p.width for p in part.parameters) for part in parts) == pytest.approx(
        math.prod(p.width for p in box.parameters)
    )
    assert sorted({part.parameters[0].low for part in parts}) == pytest.approx([1e-4, 1e-2, 1.0, 1e2])
    assert {part.parameters[1].low for part in parts} == {0.0, 1.5}


def test_parts_that_overlap_reach_into_each_other() -> None:
    box = Space((Parameter(("a",), 1e-4, 1e4, log=True), Parameter(("b",), 0.0, 3.0)))
    first, second = (part.parameters[0] for part in parts_of(box, 2, overlap=0.25))
    assert (first.low, first.high) == pytest.approx((1e-4, 10.0))
    assert (second.low, second.high) == pytest.approx((0.1, 1e4))


def test_a_search_takes_from_the_store_what_lies_in_its_part() -> None:
    first, second = (
        Driver(BilevelOptimizer(part, Default())) for part in parts_of(SeveralOptima().space, 2, overlap=0.1)
    )
    low, high = second.search.space.parameters[0].low, first.search.space.parameters[0].high
    config = first.search.ask("0")
    assert config is not None
    for number, (value, there) in enumerate([((low + high) / 2, True), (low - 0.01, False)]):
        path = first.search.space.parameters[0].path
        point = nest({**flatten(config), path: value})
        take(second, first, f"0-{number}", point, 0.5)
        take(first, first, f"0-{number}", point, 0.5)
        assert (f"0-{number}" in second.search.trials) == there
    assert [(training.status, training.upper_loss) for training in second.search.state.trainings] == [("stopped", 0.5)]
    assert len(first.search.state.trainings) == 1


@pytest.mark.slow
def test_searches_side_by_side_train_what_they_are_given_and_find_more() -> None:
    problem = SeveralOptima()
    outcome = run(problem, 2, 4, 10, share=True, seed=0)
    assert len(outcome.best) == 10
    assert outcome.best == sorted(outcome.best, reverse=True)
    assert outcome.best[-1] < outcome.best[0]
    assert outcome.best[-1] >= problem.optimum
