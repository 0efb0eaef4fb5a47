"""Checkpoints as bytes: tensors and plain values, with a format version; reading one never runs code from it."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from raybilevel.errors import CheckpointError

LOWER_LEVEL_FORMAT = 3
"""Of the checkpoints of a lower-level training."""


def dump(state: Mapping[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


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
