"""How many trainings are under way at once: what the user says, what Tune says, what the cluster holds."""

from __future__ import annotations

import sys

import pytest

from raybilevel.tune import _slots as slots
from raybilevel.tune._slots import Slots


@pytest.fixture(autouse=True)
def cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds 40 trainings."""
    monkeypatch.setattr(slots, "trainings_that_fit", lambda bundles: 40)


@pytest.mark.parametrize(("samples", "most"), [(None, 16), (20, 16), (100, 25), (1000, 40), (sys.maxsize, 16)])
def test_a_cluster_is_filled_up_to_a_share_of_all_trials(samples: int | None, most: int) -> None:
    found = Slots(None, [{"CPU": 1.0}])
    found.begin_run(samples)
    assert found.limit is None and found.now == most


def test_a_resumed_run_has_as_many_as_before() -> None:
    found = Slots(None, [{"CPU": 1.0}])
    found.restore(25)
    assert found.now == 25


def test_a_limit_of_tune_stays_within_the_user_s() -> None:
    found = Slots(8, [{"CPU": 1.0}])
    assert found.now == 8
    assert [found.limit_to(count) for count in (2, 6, 20)] == [2, 6, 8]
    assert Slots(None, [{"CPU": 1.0}]).limit_to(3) == 3


def test_where_nothing_fits_one_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "trainings_that_fit", lambda bundles: 0)
    assert Slots(None, [{"GPU": 1.0}]).now == 1
