"""Torch's global random numbers, lent to a training and given back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def forked_random(device: str | torch.device) -> Iterator[Any]:
    """Torch's global random numbers, those of the device included, are as before after the block. The accelerator's
    module, e.g. `torch.cuda`; None on the CPU."""
    device = torch.device(device)
    accelerator = None if device.type == "cpu" else torch.get_device_module(device)
    with torch.random.fork_rng(
        devices=[] if accelerator is None else [accelerator.current_device()],
        device_type="cuda" if accelerator is None else device.type,
    ):
        yield accelerator
