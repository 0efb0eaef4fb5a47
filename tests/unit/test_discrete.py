from __future__ import annotations

import torch
from botorch.acquisition import AcquisitionFunction
from torch import Tensor, nn

from raybilevel._models.discrete import covering, neighbours, promising, snapped
from tests.problems_for_tests import vector

DISCRETE = {1: (0.25, 0.75), 3: (1 / 6, 0.5, 5 / 6)}


class Bowl(AcquisitionFunction):  # type: ignore[misc]
    """Largest at a point."""

    def __init__(self, best: Tensor) -> None:
        super().__init__(nn.Module())
        self.best = best

    def forward(self, X: Tensor) -> Tensor:
        return -(X[:, 0] - self.best).square().sum(-1)


def test_discrete_coordinates_are_snapped_and_others_left() -> None:
    found = snapped(torch.stack([vector(0.1, 0.4, 0.2, 0.4), vector(0.9, 0.6, 0.3, 1.0)]), DISCRETE)
    torch.testing.assert_close(found, torch.stack([vector(0.1, 0.25, 0.2, 0.5), vector(0.9, 0.75, 0.3, 5 / 6)]))


def test_neighbours_differ_in_one_discrete_coordinate() -> None:
    point = vector(0.1, 0.25, 0.2, 0.5)
    found = neighbours(point, DISCRETE)
    assert torch.equal(found[0], point) and len(found) == 1 + 1 + 2
    assert all((other != point).sum() == 1 and other[0] == 0.1 and other[2] == 0.2 for other in found[1:])


def test_the_best_settings_are_tried_each_once() -> None:
    best = vector(0.1, 0.75, 0.2, 5 / 6)
    points = torch.stack([vector(0.1, 0.25, 0.2, 5 / 6), vector(0.8, 0.25, 0.9, 5 / 6)])
    found = promising(Bowl(best), points, DISCRETE, count=3)
    assert torch.equal(found[0], best)
    settings = [tuple(point[[1, 3]].tolist()) for point in found]
    assert len(set(settings)) == 3


def test_a_start_design_meets_every_value() -> None:
    found = covering(torch.full((6, 4), 0.5, dtype=torch.double), DISCRETE, seed=3)
    assert [found[:, 1].tolist().count(value) for value in DISCRETE[1]] == [3, 3]
    assert [found[:, 3].tolist().count(value) for value in DISCRETE[3]] == [2, 2, 2]
    assert bool((found[:, [0, 2]] == 0.5).all())
    assert torch.equal(found, covering(torch.full((6, 4), 0.5, dtype=torch.double), DISCRETE, seed=3))
