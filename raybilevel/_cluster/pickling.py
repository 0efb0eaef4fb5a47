"""Whether a value can be sent to other processes, and what of it cannot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from ray.cloudpickle import CloudPickler
from torch import Tensor

from raybilevel.errors import ProblemError


def check_can_be_sent(problem: object) -> None:
    """Try to pickle a problem, without the contents of its tensors and arrays.

    Raises:
        ProblemError: it cannot be pickled. The attribute is named.
    """
    error = refusal(problem)
    if error is None:
        return
    name = type(problem).__name__
    path, part, error = culprit(problem, name, error, set())
    what = f"a {type(part).__name__}" if part is not problem else "something that its methods refer to"
    raise ProblemError(
        f"{path}: {what} cannot be pickled ({type(error).__name__}: {error}), and the problem is sent to the processes "
        "that train; make it in the method that uses it, or leave it out in __getstate__"
    )


def culprit(value: Any, path: str, error: Exception, seen: set[int]) -> tuple[str, Any, Exception]:
    """The innermost part of a value that is refused: its path, itself, and why."""
    seen.add(id(value))
    for name, part in parts(value):
        if id(part) not in seen and (found := refusal(part)) is not None:
            return culprit(part, path + name, found, seen)
    return path, value, error


def parts(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        yield from ((f"[{key!r}]", part) for key, part in value.items())
    elif isinstance(value, list | tuple | set):
        yield from ((f"[{number}]", part) for number, part in enumerate(value))
    elif not isinstance(value, type):
        yield from ((f".{name}", part) for name, part in getattr(value, "__dict__", {}).items())


def refusal(value: Any) -> Exception | None:
    """What pickling a value raises."""
    try:
        _DryPickler(_Nowhere()).dump(value)
    except Exception as error:  # whatever the value's own code raises
        return error
    return None


class _Nowhere:
    def write(self, data: bytes) -> int:
        return len(data)


class _DryPickler(CloudPickler):  # type: ignore[misc]
    """Leaves out tensors and arrays, which can always be pickled and may be large."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, Tensor) or (isinstance(value, np.ndarray) and not value.dtype.hasobject):
            # A 0 in its place: all that counts is whether the rest is refused.
            return int, ()
        return super().reducer_override(value)
