"""Several searches with a part of the box each, in simulated time."""

from __future__ import annotations

import math

import pytest

from raybilevel.benchmark.sharded import parts_of, run
from raybilevel.problems.synthetic import SeveralOptima
from raybilevel.space import Parameter, Space


def test_parts_make_up_the_box() -> None:
    box = Space((Parameter(("a",), 1e-4, 1e4, log=True), Parameter(("b",), 0.0, 3.0)))
    parts = parts_of(box, 8)
    assert len(set(parts)) == 8
    assert sum(math.prod(p.width for p in part.parameters) for part in parts) == pytest.approx(
        math.prod(p.width for p in box.parameters)
    )
    assert sorted({part.parameters[0].low for part in parts}) == pytest.approx([1e-4, 1e-2, 1.0, 1e2])
    assert {part.parameters[1].low for part in parts} == {0.0, 1.5}


@pytest.mark.slow
def test_searches_side_by_side_train_what_they_are_given_and_find_more() -> None:
    problem = SeveralOptima()
    outcome = run(problem, 2, 4, 10, share=True, seed=0)
    assert len(outcome.best) == 10
    assert outcome.best == sorted(outcome.best, reverse=True)
    assert outcome.best[-1] < outcome.best[0]
    assert outcome.best[-1] >= problem.optimum
