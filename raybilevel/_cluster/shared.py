"""A value that every process unpickles once, however often it is handed out."""

from __future__ import annotations

import hashlib
import pickle
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from ray import cloudpickle

T = TypeVar("T")

KEPT = 4
"""Values that a process keeps: those of a few experiments that share workers."""

_lock = threading.Lock()
_kept: OrderedDict[str, Any] = OrderedDict()


class Shared(Generic[T]):
    """Hands a value, a problem with its data for instance, to tasks and trials.

    It pickles as one out-of-band buffer under a key, the buffer's hash. Ray maps such a buffer from its object store
    without copying it, and only the first of its trials and upper-level steps in a process unpickles it; the later ones
    find it by its key. They so share one object.
    """

    def __init__(self, value: T) -> None:
        self.value = value
        self._pickled: tuple[str, bytes] | None = None

    def __reduce_ex__(self, protocol: Any) -> tuple[Callable[..., Shared[T]], tuple[Any, ...]]:
        if self._pickled is None:
            data = cloudpickle.dumps(self.value)
            self._pickled = hashlib.sha256(data).hexdigest(), data
        key, data = self._pickled
        return _unpickle, (key, pickle.PickleBuffer(data) if protocol >= 5 else data)


def _unpickle(key: str, data: Any) -> Shared[Any]:
    with _lock:
        if key not in _kept:
            _kept[key] = pickle.loads(data)
        _kept.move_to_end(key)
        while len(_kept) > KEPT:
            _kept.popitem(last=False)
        return Shared(_kept[key])
