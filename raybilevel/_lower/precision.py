"""Gradients whose differences are taken: in the precision of their tensors, and not in a coarser one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def _settings() -> list[tuple[object, str, object]]:
    """What may let float32 be multiplied in TF32 or bfloat16: an object, its attribute, the value that does not."""
    backends: Any = torch.backends
    if hasattr(backends.cudnn, "conv"):  # torch 2.9 and later, which refuse that old and new names are mixed
        owners = [backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn]
        owners += [backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn]
        return [(owner, "fp32_precision", "ieee") for owner in owners]
    return [(backends.cuda.matmul, "allow_tf32", False), (backends.cudnn, "allow_tf32", False)]


@contextmanager
def full_precision() -> Iterator[None]:
    """Inside the block torch multiplies float32 as float32. Autocast, which a loss itself begins, stays as it is."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in _settings()]
    for owner, name, exact in _settings():
        setattr(owner, name, exact)
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)
