"""Which idle actors a Tune run keeps, and for how long."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from ray.tune.execution.tune_controller import TuneController
from ray.tune.utils.object_cache import _ObjectCache

from raybilevel._tune_changes.idle_actors import IDLE_ACTORS, IdleActorCache, keep_idle_actors
from tests.clock import Clock

TIMEOUT_S = 60.0


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def kept(clock: Clock) -> IdleActorCache:
    return IdleActorCache(TIMEOUT_S, clock)


def test_all_idle_actors_are_kept_and_the_newest_is_used_first(kept: IdleActorCache, clock: Clock) -> None:
    for actor in "abc":
        assert kept.cache_object("one CPU", actor)
        clock.now += 1
    assert list(kept.flush_cached_objects()) == []
    assert [kept.pop_cached_object("one CPU") for _ in range(4)] == ["c", "b", "a", None]
    assert kept.num_cached_objects == 0
    assert not kept.has_cached_object("one CPU")


def test_actors_idle_beyond_the_timeout_are_stopped_except_the_last(kept: IdleActorCache, clock: Clock) -> None:
    kept.cache_object("one CPU", "a")
    clock.now += TIMEOUT_S / 2
    kept.cache_object("one CPU", "b")
    clock.now += TIMEOUT_S / 2 + 1
    assert list(kept.flush_cached_objects()) == ["a"]
    clock.now += TIMEOUT_S
    assert list(kept.flush_cached_objects()) == []
    kept.increase_max("one CPU")  # a trial waits for it
    kept.cache_object("one CPU", "c")
    clock.now += 2 * TIMEOUT_S
    assert list(kept.flush_cached_objects()) == ["b"]
    assert kept.num_cached_objects == 1


def test_actors_are_stopped_at_once_for_a_trial_with_other_resources(kept: IdleActorCache) -> None:
    kept.cache_object("one CPU", "a")
    kept.cache_object("one CPU", "b")
    kept.increase_max("a GPU")
    assert list(kept.flush_cached_objects()) == ["a", "b"]


def test_no_actor_is_kept_at_the_end(kept: IdleActorCache) -> None:
    kept.cache_object("one CPU", "a")
    kept.cache_object("a GPU", "b")
    assert list(kept.flush_cached_objects(force_all=True)) == ["a", "b"]
    assert kept.num_cached_objects == 0


class Controller:
    """What has a cache of actors, as Tune's controller has."""

    def __init__(self, cache: Any) -> None:
        self._actor_cache = cache


def test_a_run_is_changed_once_and_only_before_an_actor_is_idle(clock: Clock) -> None:
    controller = Controller(_ObjectCache())
    controller._actor_cache.increase_max("one CPU")
    keep_idle_actors(controller, TIMEOUT_S, clock)
    kept = controller._actor_cache
    assert isinstance(kept, IdleActorCache)
    assert kept.total_max_objects == 1
    keep_idle_actors(controller, TIMEOUT_S, clock)
    assert controller._actor_cache is kept

    late = Controller(_ObjectCache())
    late._actor_cache.cache_object("one CPU", "a")
    keep_idle_actors(late, TIMEOUT_S, clock)
    assert type(late._actor_cache) is _ObjectCache


def test_a_controller_of_tune_has_the_cache_that_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNE_MAX_PENDING_TRIALS_PG", "1")  # else it asks a cluster for its CPUs
    controller = TuneController(storage=object())
    keep_idle_actors(controller, TIMEOUT_S)
    assert isinstance(controller._actor_cache, IdleActorCache)
    assert type(TuneController(storage=object())._actor_cache) is _ObjectCache  # of another run


@pytest.mark.parametrize("cache", [None, {}])
def test_a_missing_cache_is_reported_once(cache: Any, caplog: pytest.LogCaptureFixture) -> None:
    controller = Controller(cache)
    for _ in range(2):
        keep_idle_actors(controller, TIMEOUT_S)
    assert controller._actor_cache is cache
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert IDLE_ACTORS.target in record.getMessage()
