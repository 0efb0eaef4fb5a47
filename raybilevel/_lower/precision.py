"""The precision in which gradients are computed, whose differences are taken."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def _settings() -> list[tuple[object, str, object]]:
    """What may let float32 be multiplied in TF32 or bfloat16: an object, its attribute, the value that does not."""
    backends: Any = torch.backends
    if hasattr(backends.cudnn, "conv"):  # torch 2.9 and later, which refuse that old and new names are mixed
        owners = [backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn]
        owners += [backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn]
        return [(owner, "fp32_precision", "ieee") for owner in owners]
    return [(backends.cuda.matmul, "allow_tf32", False), (backends.cudnn, "allow_tf32", False)]


class Narrowest(TorchDispatchMode):
    """Sees the coarsest floating-point type of all that is computed inside the block, e.g. that of autocast.

    dtype: that type; the one given if nothing is coarser.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtype = dtype

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for entry in tree_leaves(found):
            if isinstance(entry, Tensor) and entry.is_floating_point():
                # By eps and not by size: bfloat16 is coarser than float16.
                self.dtype = max(self.dtype, entry.dtype, key=lambda dtype: torch.finfo(dtype).eps)
        return found


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
