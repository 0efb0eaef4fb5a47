"""Checkpoints as bytes: tensors and plain values, with a format version; reading one never runs code from it."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raybilevel.errors import CheckpointError

LOWER_LEVEL_FORMAT = 4
"""Of the checkpoints of a lower-level training."""
PLAIN = (bool, int, float, str, bytes, type(None), Tensor)


def dump(state: Mapping[str, Any]) -> bytes:
    """A state as bytes that `load` reads; numbers of NumPy become Python's.

    Raises:
        CheckpointError: it holds what `load` would refuse; it is named.
    """
    state = without_numpy(state)
    buffer = io.BytesIO()
    try:
        torch.save(state, buffer)
    except (pickle.PicklingError, AttributeError, TypeError) as error:  # as pickle has it, e.g. for a lambda
        raise unreadable(state, str(error)) from error
    buffer.seek(0)
    # This reads the types in the file, and no tensor.
    refused = torch.serialization.get_unsafe_globals_in_checkpoint(buffer)
    if refused:
        raise unreadable(state, ", ".join(sorted(refused)))
    return buffer.getvalue()


def unreadable(state: Mapping[str, Any], reason: str) -> CheckpointError:
    where = next((f"{'/'.join(path)} is a {type(entry).__name__}" for path, entry in others(state)), "it")
    return CheckpointError(
        f"a checkpoint of this training could not be read again: {where} ({reason}); "
        "keep tensors, numbers and strings in the state of model and optimizer, e.g. lr=float(lr)"
    )


def without_numpy(entry: Any) -> Any:
    """The same state, with Python's numbers for NumPy's; what has none of them is the same object."""
    if isinstance(entry, np.generic):
        return entry.item()
    if isinstance(entry, Mapping):
        mapped = {without_numpy(key): without_numpy(value) for key, value in entry.items()}
        unchanged = all(key in entry and mapped[key] is entry[key] for key in mapped) and not any(
            isinstance(key, np.generic) for key in entry
        )
        return entry if unchanged else mapped
    # Exactly these two: a named tuple cannot be built again from one list.
    if type(entry) in (list, tuple):
        listed = [without_numpy(value) for value in entry]
        return entry if all(a is b for a, b in zip(listed, entry, strict=True)) else type(entry)(listed)
    return entry


def others(entry: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """What is neither a tensor, a plain value nor a collection of them, by its path."""
    if isinstance(entry, Mapping):
        for key, value in entry.items():
            yield from others(value, (*path, str(key)))
    elif isinstance(entry, list | tuple | set):
        for number, value in enumerate(entry):
            yield from others(value, (*path, str(number)))
    elif not isinstance(entry, PLAIN):
        yield path, entry


def load(source: bytes | Path, what: str, version: int) -> dict[str, Any]:
    """A state, on the CPU; `what` it is of is for errors.

    Raises:
        CheckpointError: it is missing, damaged, or of another format version.
    """
    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError, OSError, ... for damaged files
        raise CheckpointError(f"cannot read a {what} checkpoint: {error}") from error
    if not isinstance(state, dict) or state.get("format") != version:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise CheckpointError(f"a {what} checkpoint has format {found}; this version reads {version}")
    return state
