"""Whether the problem of a search is the one that is trained."""

from __future__ import annotations

import hashlib
import uuid
import weakref
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

SAMPLED_BYTES = 1 << 20
"""Of larger tensors only about so many bytes are looked at, evenly spaced."""

SAMPLED_PARTS = 1000
"""Of longer collections only so many parts are."""

_instances: dict[int, str] = {}


def identity_of(problem: object) -> str:
    """What `is_other` compares: of the object in this process, and of its class and attributes."""
    if id(problem) not in _instances:
        _instances[id(problem)] = uuid.uuid4().hex
        # Python gives the id of an object that is gone to another one.
        weakref.finalize(problem, _instances.pop, id(problem), None)
    digest = hashlib.blake2b(digest_size=16)
    _add(digest, problem, set())
    return f"{_instances[id(problem)]}/{digest.hexdigest()}"


def is_other(one: str, two: str) -> bool:
    """Whether two identities are neither of one object nor of equal ones."""
    return not any(a == b for a, b in zip(one.split("/"), two.split("/"), strict=False))


def _add(digest: Any, value: Any, seen: set[int]) -> None:
    """What a value is made of, in an order that does not depend on how it came about."""
    digest.update(type(value).__qualname__.encode())
    if isinstance(value, Tensor | np.ndarray):
        _add_array(digest, value)
    elif isinstance(value, bool | int | float | complex | str | bytes | torch.dtype | torch.device | None):
        digest.update(repr(value).encode())
    # Objects may refer to each other in a circle.
    elif id(value) not in seen:
        seen.add(id(value))
        if isinstance(value, Mapping):
            # By repr, as keys of different types have no order.
            for key in sorted(value, key=repr)[:SAMPLED_PARTS]:
                _add(digest, key, seen)
                _add(digest, value[key], seen)
        elif isinstance(value, list | tuple):
            digest.update(str(len(value)).encode())
            for part in value[:SAMPLED_PARTS]:
                _add(digest, part, seen)
        elif not isinstance(value, type):
            _add(digest, _attributes(value), seen)


def _attributes(value: Any) -> dict[str, Any]:
    """Without what is worked out when it is asked for."""
    return {
        name: part
        for name, part in getattr(value, "__dict__", {}).items()
        if not isinstance(getattr(type(value), name, None), cached_property)
    }


def _add_array(digest: Any, array: Tensor | np.ndarray) -> None:
    digest.update(str((tuple(array.shape), str(array.dtype))).encode())
    if isinstance(array, np.ndarray):
        # Their bytes are addresses, which differ from process to process.
        if array.dtype.hasobject:
            return
        flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    else:
        if array.layout != torch.strided:
            array = array.to_dense()
        flat = array.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    digest.update(flat[:: 1 + len(flat) // SAMPLED_BYTES].tobytes())
