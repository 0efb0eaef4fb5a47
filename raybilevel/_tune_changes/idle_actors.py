"""Idle actors are kept for a while, as the search may be about to suggest their next trial."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakSet

from raybilevel._tune_changes.change import TuneChange

try:
    from ray.tune.utils.object_cache import _ObjectCache
except ImportError:
    _ObjectCache = object

FIELDS = {"_cached_objects", "_num_cached_objects", "_max_num_objects"}

# With `reuse_actors=True` upstream keeps one idle actor and stops the others that have no pending trial. A search that
# is still computing the next trial is too late then, and every training begins with a worker's start.
IDLE_ACTORS = TuneChange(
    name="timeout of idle actors",
    module="ray.tune.execution.tune_controller",
    owner="TuneController",
    attribute="_actor_cache",
    versions=("2.50.1", "2.55.1", "2.60.0"),
    without="all idle actors but one are stopped, and trainings wait for new ones to start",
)

_asked: WeakSet[Any] = WeakSet()


def keep_idle_actors(controller: Any, timeout_s: float, clock: Callable[[], float] = time.monotonic) -> None:
    """Let one Tune run keep idle actors. Call it before the first actor is idle; later it has no effect.

    controller: Tune's `TuneController`. The change ends with its life.
    timeout_s:  seconds that an actor may be idle.
    """
    if controller in _asked:
        return
    _asked.add(controller)
    cache: Any = getattr(controller, IDLE_ACTORS.attribute, None)
    if type(cache) is not _ObjectCache or not vars(cache).keys() >= FIELDS:
        IDLE_ACTORS.warn_of_missing()
    elif not cache.num_cached_objects:  # else the actors in the old cache would never be stopped
        patient = IdleActorCache(timeout_s, clock)
        patient._max_num_objects = cache._max_num_objects
        setattr(controller, IDLE_ACTORS.attribute, patient)
        IDLE_ACTORS.log_applied()


class IdleActorCache(_ObjectCache):  # type: ignore[misc]
    """Tune's cache of idle actors, with a timeout.

    An actor is kept until it has been idle for `timeout_s`, or until its resources are needed for a trial with other
    requests. The actor that became idle last is used first, so that actors in excess reach the timeout.

    clock: returns seconds, from any origin.
    """

    def __init__(self, timeout_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(may_keep_one=True)
        self._timeout_s = timeout_s
        self._clock = clock
        self._since: dict[Any, float] = {}

    def cache_object(self, key: Any, obj: Any) -> bool:
        self._cached_objects[key].append(obj)
        self._num_cached_objects += 1
        self._since[obj] = self._clock()
        return True

    def pop_cached_object(self, key: Any) -> Any:
        return self._take(key, -1) if self.has_cached_object(key) else None

    def flush_cached_objects(self, force_all: bool = False) -> Iterator[Any]:
        """Remove the actors that are to be stopped, and return them."""
        for key, actors in self._cached_objects.items():
            while actors and (force_all or self._is_surplus(key, actors)):
                yield self._take(key, 0)

    def _is_surplus(self, key: Any, actors: list[Any]) -> bool:
        """Whether the actor that has been idle longest is to be stopped."""
        if len(actors) <= self._max_num_objects[key]:
            return False
        # A pending trial needs other resources, and these actors may hold them.
        if any(count > 0 for other, count in self._max_num_objects.items() if other != key):
            return True
        kept_anyway = self._num_cached_objects == 1 and not self.total_max_objects  # as upstream's `may_keep_one`
        return not kept_anyway and self._clock() - self._since[actors[0]] > self._timeout_s

    def _take(self, key: Any, place: int) -> Any:
        actor = self._cached_objects[key].pop(place)
        self._num_cached_objects -= 1
        del self._since[actor]
        return actor
