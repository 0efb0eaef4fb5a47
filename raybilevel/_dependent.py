"""Values of a config that a function makes of the others (Tune's `sample_from`)."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from raybilevel._tree import Path, flatten, leaves, named, nest, replaced
from raybilevel.errors import SpaceError

PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Dependent:
    """Stands in a config for what `function` makes of the rest of it. The function is given the config, nested."""

    function: Callable[[Mapping[str, Any]], Any] = field(compare=False)


def resolved(searched: dict[str, Any], around: Mapping[str, Any]) -> dict[str, Any]:
    """A config with the values of its functions. They may need each other's.

    A config has the same values whenever and wherever it is made: functions that draw random numbers, of `random`,
    numpy or torch, do so from a seed that the config gives.

    around: constants that the functions are given as well.

    Raises:
        SpaceError: a function failed; it is named.
    """
    found = leaves(searched)
    waiting = {path: entry for path, entry in found.items() if isinstance(entry, Dependent)}
    if not waiting:
        return searched
    # Sorted, or the seed would depend on the order in which entries were written.
    plain = sorted((named(path), entry) for path, entry in found.items() if isinstance(entry, PLAIN))
    with seeded(repr([(name, rounded(entry)) for name, entry in plain])):
        while waiting:
            failed: list[tuple[Path, Exception]] = []
            before = len(waiting)
            for path, dependent in list(waiting.items()):
                try:
                    value = dependent.function(without(waiting, searched, around))
                except Exception as error:  # whatever a user's function raises; it may need another one's value
                    failed.append((path, error))
                    continue
                searched = replaced(searched, {path: value})
                del waiting[path]
            # A round in which none got its value: no further one will differ.
            if len(waiting) == before:
                path, why = failed[0]
                raise SpaceError(
                    f"{named(path)}: its function raised {type(why).__name__}: {why}. It is given the "
                    "config, constants included"
                ) from why
    return searched


def rounded(entry: Any) -> Any:
    """Floats with 12 digits: the last ones may differ once a config has been through the unit cube."""
    return float(f"{entry:.12g}") if isinstance(entry, float) else entry


def without(waiting: Mapping[Any, Any], searched: Mapping[str, Any], around: Mapping[str, Any]) -> dict[str, Any]:
    """The config so far."""
    whole = {**flatten(around), **flatten(searched)}
    return nest({path: value for path, value in whole.items() if path not in waiting})


@contextmanager
def seeded(text: str) -> Iterator[None]:
    """Within it the global random numbers of Python, numpy and torch follow from a text."""
    # Not `hash`, which is salted in each process. NumPy takes 32 bits.
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4])
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
