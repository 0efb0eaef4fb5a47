"""A value that every process unpickles only once, however often it is sent."""

from __future__ import annotations

import hashlib
import pickle
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from ray import cloudpickle

T = TypeVar("T")

MAX_CACHED_VALUES = 4
"""Values that a process caches. A few experiments may share its worker."""

_lock = threading.Lock()
_kept: OrderedDict[str, Any] = OrderedDict()


class Shared(Generic[T]):
    """Sends a value, such as a problem with its data, to tasks and trials.

    It pickles as one out-of-band buffer under a key, the hash of the buffer. Ray maps such a buffer from its object
    store without a copy. Only the first trial or upper-level step in a process unpickles it. The later ones find the
    value by its key and share that object.
    """

    def __init__(self, value: T) -> None:
        self.value = value
        self._pickled: tuple[str, bytes] | None = None

    def __reduce_ex__(self, protocol: Any) -> tuple[Callable[..., Shared[T]], tuple[Any, ...]]:
        if self._pickled is None:  # cached, as the value may hold a whole data set
            data = cloudpickle.dumps(self.value)
            self._pickled = hashlib.sha256(data).hexdigest(), data
        key, data = self._pickled
        # Buffers out of band begin with protocol 5.
        return _unpickle, (key, pickle.PickleBuffer(data) if protocol >= 5 else data)


def _unpickle(key: str, data: Any) -> Shared[Any]:
    with _lock:
        if key not in _kept:
            _kept[key] = pickle.loads(data)
        _kept.move_to_end(key)
        while len(_kept) > MAX_CACHED_VALUES:
            _kept.popitem(last=False)
        return Shared(_kept[key])
