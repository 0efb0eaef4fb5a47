from __future__ import annotations

import pytest
import torch

from raybilevel._descents.draws import MOST_DRAWS, averaged
from raybilevel._descents.fixed_x import LagrangianPoint
from raybilevel._lower.hypergradient import Hypergradient


def of_draw(draw: int, scatter: float) -> LagrangianPoint:
    noise = torch.randn(3, generator=torch.Generator().manual_seed(draw), dtype=torch.double)
    return LagrangianPoint(Hypergradient(torch.ones(3).double() + scatter * noise, 1.0), 1.0, 0.1, 0.0, torch.zeros(2))


@pytest.mark.parametrize(("scatter", "count"), [(1e-3, 2), (0.5, MOST_DRAWS), (50.0, MOST_DRAWS)])
def test_the_number_of_draws_follows_from_their_scatter(scatter: float, count: int):
    taken = [0]

    def another(draw: int) -> LagrangianPoint:
        taken.append(draw)
        return of_draw(draw, scatter)

    found = averaged(of_draw(0, scatter), another, affordable=100)
    assert taken == list(range(count))
    expected = torch.stack([of_draw(draw, scatter).gradient for draw in taken]).mean(0)
    assert found.gradient.tolist() == pytest.approx(expected.tolist())


def test_draws_end_with_the_budget():
    first = of_draw(0, 1.0)
    assert averaged(first, lambda draw: of_draw(draw, 1.0), affordable=1).gradient.tolist() == first.gradient.tolist()
