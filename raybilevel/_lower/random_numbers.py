"""Torch's global random numbers: lent to a training and given back, or the same at each evaluation of a level."""

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


class CommonRandomNumbers:
    """The same random numbers at each evaluation of a loss, so that differences of it hold none of its noise.

    draw: which ones.
    used: whether anything has drawn so far.
    """

    def __init__(self, device: str | torch.device, draw: int = 0) -> None:
        self.device, self.draw, self.used = device, draw, False

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with forked_random(self.device) as accelerator:
            torch.manual_seed(self.draw)
            sources = (torch,) if accelerator is None else (torch, accelerator)
            before = [source.get_rng_state() for source in sources]
            yield
            after = (source.get_rng_state() for source in sources)
            self.used |= not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
