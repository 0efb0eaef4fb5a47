"""Actors that have run a trial are kept for a while, for a search that is about to say the next trial."""

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

# With `reuse_actors=True` upstream keeps one idle actor for which there is no pending trial, and stops the others. A
# search that thinks about the next trial is later than that, and every training begins with a worker's start.
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
    """Have one Tune run keep idle actors. To be called before the first one is idle, and without effect later.

    controller: Tune's `TuneController`, with whose life the change ends.
    timeout_s:  how long an actor may be idle.
    """
    if controller in _asked:
        return
    _asked.add(controller)
    cache: Any = getattr(controller, IDLE_ACTORS.attribute, None)
    if type(cache) is not _ObjectCache or not vars(cache).keys() >= FIELDS:
        IDLE_ACTORS.warn_of_missing()
    elif not cache.num_cached_objects:
        patient = IdleActorCache(timeout_s, clock)
        patient._max_num_objects = cache._max_num_objects
        setattr(controller, IDLE_ACTORS.attribute, patient)
        IDLE_ACTORS.log_applied()


class IdleActorCache(_ObjectCache):  # type: ignore[misc]
    """Tune's cache of idle actors, with a timeout.

    An actor is kept until it has been idle for `timeout_s`, or its resources are wanted for a trial that asks for
    others. Those idle last are used first, so that those that are not needed get old.

    clock: seconds, from anywhere.
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
        """The actors to stop, which are no longer kept."""
        for key, actors in self._cached_objects.items():
            while actors and (force_all or self._is_too_much(key, actors)):
                yield self._take(key, 0)

    def _is_too_much(self, key: Any, actors: list[Any]) -> bool:
        """Whether the actor that has been idle for longest is to go."""
        if len(actors) <= self._max_num_objects[key]:
            return False
        if any(count > 0 for other, count in self._max_num_objects.items() if other != key):
            return True
        the_last = self._num_cached_objects == 1 and not self.total_max_objects
        return not the_last and self._clock() - self._since[actors[0]] > self._timeout_s

    def _take(self, key: Any, place: int) -> Any:
        actor = self._cached_objects[key].pop(place)
        self._num_cached_objects -= 1
        del self._since[actor]
        return actor
