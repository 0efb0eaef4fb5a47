"""The rival with a trust region and no gradients."""

from __future__ import annotations

import pytest
import torch

from benchmarks.peers import START_DESIGN
from benchmarks.turbo import FIRST_LENGTH, LARGEST_LENGTH, PERTURBED, SUCCESSES, Region, candidates, turbo
from tests.problems_for_tests import vector
from tests.rivals import until_spent


def test_a_region_grows_after_successes_and_shrinks_after_as_many_failures_as_coordinates() -> None:
    region = Region()
    for _ in range(SUCCESSES):
        region = region.after(True, 6)
    assert region == Region(2 * FIRST_LENGTH) and region.length == LARGEST_LENGTH
    for number in range(6):
        assert region.length == LARGEST_LENGTH, number
        region = region.after(False, 6)
    assert region == Region(FIRST_LENGTH)
    assert Region(successes=2).after(False, 6) == Region(failures=1)


def test_candidates_are_in_a_box_of_the_ratios_of_the_lengths() -> None:
    centre, lengths = vector(0.5, 0.5), vector(1.0, 4.0)
    found = candidates(centre, lengths, 0.2, 0)
    away = (found - centre).abs().amax(0)
    assert away.tolist() == pytest.approx([0.05, 0.2], rel=0.02)


def test_candidates_differ_from_the_centre_in_some_of_many_coordinates() -> None:
    d = 200
    centre = torch.full((d,), 0.5, dtype=torch.double)
    moved = (candidates(centre, torch.ones(d, dtype=torch.double), 0.4, 0) != centre).sum(1).double()
    assert moved.min() >= 1 and moved.mean().item() == pytest.approx(PERTURBED, rel=0.1)


def test_a_search_goes_below_its_start_design() -> None:
    _, upper, optimum = until_spent(turbo, 25)
    assert len(upper) == 25
    assert min(upper) - optimum < 0.7 * (min(upper[:START_DESIGN]) - optimum)
