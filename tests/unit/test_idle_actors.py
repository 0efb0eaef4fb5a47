"""Which free processes a Tune run keeps, and for how long."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from ray.tune.utils.object_cache import _ObjectCache

from raybilevel._tune_changes.kept_processes import KeptProcesses, keep_processes
from tests.clock import Clock

SECONDS = 60.0


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def kept(clock: Clock) -> KeptProcesses:
    return KeptProcesses(SECONDS, clock)


def test_all_free_processes_are_kept_and_the_newest_is_used_first(kept: KeptProcesses, clock: Clock) -> None:
    for process in "abc":
        assert kept.cache_object("one CPU", process)
        clock.now += 1
    assert list(kept.flush_cached_objects()) == []
    assert [kept.pop_cached_object("one CPU") for _ in range(4)] == ["c", "b", "a", None]
    assert kept.num_cached_objects == 0
    assert not kept.has_cached_object("one CPU")


def test_those_that_have_been_free_for_long_go_but_the_last_one(kept: KeptProcesses, clock: Clock) -> None:
    kept.cache_object("one CPU", "a")
    clock.now += SECONDS / 2
    kept.cache_object("one CPU", "b")
    clock.now += SECONDS / 2 + 1
    assert list(kept.flush_cached_objects()) == ["a"]
    clock.now += SECONDS
    assert list(kept.flush_cached_objects()) == []
    kept.increase_max("one CPU")  # a trial waits for it
    kept.cache_object("one CPU", "c")
    clock.now += 2 * SECONDS
    assert list(kept.flush_cached_objects()) == ["b"]
    assert kept.num_cached_objects == 1


def test_resources_that_a_trial_of_another_kind_waits_for_are_given_back_at_once(kept: KeptProcesses) -> None:
    kept.cache_object("one CPU", "a")
    kept.cache_object("one CPU", "b")
    kept.increase_max("a GPU")
    assert list(kept.flush_cached_objects()) == ["a", "b"]


def test_at_the_end_none_is_kept(kept: KeptProcesses) -> None:
    kept.cache_object("one CPU", "a")
    kept.cache_object("a GPU", "b")
    assert list(kept.flush_cached_objects(force_all=True)) == ["a", "b"]
    assert kept.num_cached_objects == 0


def test_a_run_is_changed_once_and_only_before_it_keeps_any(clock: Clock) -> None:
    controller = SimpleNamespace(_actor_cache=_ObjectCache())
    controller._actor_cache.increase_max("one CPU")
    keep_processes(controller, SECONDS, clock)
    kept = controller._actor_cache
    assert isinstance(kept, KeptProcesses)
    assert kept.total_max_objects == 1
    keep_processes(controller, SECONDS, clock)
    assert controller._actor_cache is kept

    late = SimpleNamespace(_actor_cache=_ObjectCache())
    late._actor_cache.cache_object("one CPU", "a")
    keep_processes(late, SECONDS, clock)
    assert type(late._actor_cache) is _ObjectCache
    keep_processes(SimpleNamespace(), SECONDS, clock)  # a Tune that has none
