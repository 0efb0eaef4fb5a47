"""The rival of the benchmark: regions that learn a quadratic, and what competes with them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.lago import APART, FIRST_RADIUS, LARGEST_RADIUS, Lago, Point, Region, lago
from raybilevel.space import sobol_points
from tests.problems_for_tests import vector
from tests.rivals import until_spent

HESSIAN = torch.tensor([[3.0, 1.0, 0.0], [1.0, 2.0, -0.5], [0.0, -0.5, 1.0]], dtype=torch.double)
LOWEST = vector(0.4, 0.55, 0.6)


def bowl(x: Tensor) -> Point:
    away = x - LOWEST
    return Point(x, (away @ HESSIAN @ away).item() / 2, HESSIAN @ away)


def test_a_first_step_goes_along_the_gradient_and_is_as_long_as_the_radius() -> None:
    point = Point(vector(0.5, 0.5, 0.5), 1.0, vector(0.0, 2.0, 0.0))
    x, predicted = Region.around(point).proposed()
    assert torch.allclose(x, vector(0.5, 0.5 - FIRST_RADIUS, 0.5), atol=1e-6)
    assert predicted == pytest.approx(2.0 * FIRST_RADIUS / 2)


def test_a_region_learns_a_quadratic_and_ends_at_its_minimum() -> None:
    region = Region.around(bowl(vector(0.5, 0.5, 0.5)))
    for _ in range(8):
        x, predicted = region.proposed()
        low, high = region.box
        assert bool((x >= low - 1e-12).all()) and bool((x <= high + 1e-12).all())
        if predicted < 1e-12:
            break
        region = region.told(bowl(x), predicted)
    assert torch.allclose(region.hessian, HESSIAN, atol=1e-4)
    assert torch.allclose(region.centre.x, LOWEST, atol=1e-4)


def test_a_region_grows_by_good_steps_and_shrinks_by_bad_ones() -> None:
    centre = Point(vector(0.5, 0.5), 1.0, vector(1.0, 0.0))
    region = Region.around(centre)
    x, predicted = region.proposed()
    good = region.told(Point(x, 1.0 - predicted, vector(0.9, 0.0)), predicted)
    assert good.centre.x is x and good.radius == 2 * FIRST_RADIUS
    assert good.told(Point(vector(0.7, 0.5), good.centre.value - 1.0, vector(0.9, 0.0)), 1.0).radius == LARGEST_RADIUS
    bad = region.told(Point(x, 1.5, vector(0.9, 0.0)), predicted)
    assert bad.centre is centre and bad.radius == FIRST_RADIUS / 2


def test_exploration_stays_outside_of_the_region() -> None:
    state = Lago.of([bowl(x) for x in sobol_points(3, 5, 0)])
    for seed in range(5):
        x, expected = state.explored(state.process(), seed)
        assert (x - state.region.centre.x).abs().max() >= state.region.radius - 1e-9
        assert bool((x >= 0).all()) and bool((x <= 1).all()) and expected >= 0


def test_points_of_the_region_are_kept_where_they_are_apart() -> None:
    state = Lago.of([bowl(x) for x in sobol_points(3, 5, 0)])
    process = state.process()
    centre = state.region.centre.x
    lengths = process.model.lengths
    for far in (False, True):
        step = APART * (1.5 if far else 0.5) * vector(1.0, 0.0, 0.0) * lengths[0]
        later = state.refined_at(bowl(centre + step), 1.0, process)
        assert len(later.points) == 6 and len(later.global_points) == 5 + far


def test_the_region_moves_to_a_better_point_found_outside() -> None:
    state = Lago.of([bowl(x) for x in sobol_points(3, 5, 0)])
    worse, better = bowl(vector(1.0, 1.0, 0.0)), bowl(LOWEST)
    assert state.explored_at(worse).region is state.region
    assert state.explored_at(better).region.centre is better


def test_a_search_descends_and_is_charged_for_gradients() -> None:
    objective, upper, optimum = until_spent(lago, 15)
    origins = [o.trace["origin"] for o in objective.observed]
    assert {"start", "global", "region"} == set(origins)
    first = min(value for value, origin in zip(upper, origins, strict=True) if origin == "start")
    assert min(upper) - optimum < 0.1 * (first - optimum)
    assert objective.charged > 0
