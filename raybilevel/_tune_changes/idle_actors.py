"""Processes that have run a trial and are free: kept for a while, for a search that is about to say the next trial."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from ray.tune.utils.object_cache import _ObjectCache

FIELDS = {"_cached_objects", "_num_cached_objects", "_max_num_objects"}


class KeptProcesses(_ObjectCache):  # type: ignore[misc]
    """What Tune keeps processes in (`reuse_actors=True`), with patience.

    Tune's own (2.60) lets all but one process go for which there is no trial at the moment when they become free. A
    search that thinks about the next trial is later than that, and every training begins with a process's start. Here
    each is kept until it has been free for `seconds`, or its resources are wanted for a trial that asks for others.

    clock: seconds, from anywhere.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(may_keep_one=True)
        self._seconds = seconds
        self._clock = clock
        self._since: dict[Any, float] = {}

    def cache_object(self, key: Any, obj: Any) -> bool:
        self._cached_objects[key].append(obj)
        self._num_cached_objects += 1
        self._since[obj] = self._clock()
        return True

    def pop_cached_object(self, key: Any) -> Any:
        """The one that has become free last, so that those that are not needed get old."""
        return self._take(key, -1) if self.has_cached_object(key) else None

    def flush_cached_objects(self, force_all: bool = False) -> Iterator[Any]:
        """Those to let go, which are no longer kept."""
        for key, processes in self._cached_objects.items():
            while processes and (force_all or self._is_too_much(key, processes)):
                yield self._take(key, 0)

    def _is_too_much(self, key: Any, processes: list[Any]) -> bool:
        """Whether the process that has been free for longest is to go."""
        if len(processes) <= self._max_num_objects[key]:
            return False
        if any(count > 0 for other, count in self._max_num_objects.items() if other != key):
            return True
        the_last = self._num_cached_objects == 1 and not self.total_max_objects
        return not the_last and self._clock() - self._since[processes[0]] > self._seconds

    def _take(self, key: Any, place: int) -> Any:
        process = self._cached_objects[key].pop(place)
        self._num_cached_objects -= 1
        del self._since[process]
        return process


def keep_processes(controller: Any, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
    """Have a Tune run keep free processes for so long. To be called before the first one is free, and harmless later.

    controller: Tune's `TuneController`; where it has changed by so much that it keeps processes in something else,
        nothing is done.
    """
    theirs: Any = getattr(controller, "_actor_cache", None)
    known = type(theirs) is _ObjectCache and vars(theirs).keys() >= FIELDS
    if known and not theirs.num_cached_objects:
        ours = KeptProcesses(seconds, clock)
        ours._max_num_objects = theirs._max_num_objects
        controller._actor_cache = ours
