"""Torch's global random numbers, lent to a training and given back; and the draws of losses that use them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

FEWEST_DRAWS, MOST_DRAWS = 4, 8
WANTED_ERROR = 0.02
"""Of a mean over draws, relative to it."""


@contextmanager
def forked_random(device: str | torch.device) -> Iterator[Any]:
    """Torch's global random numbers, those of the device included, are as before after the block. The accelerator's
    module, e.g. `torch.cuda`; None on the CPU."""
    device = torch.device(device)
    accelerator = None if device.type == "cpu" else torch.get_device_module(device)
    # One device by name: without names fork_rng saves the state of all, and warns where there are many.
    with torch.random.fork_rng(
        devices=[] if accelerator is None else [accelerator.current_device()],
        device_type="cuda" if accelerator is None else device.type,
    ):
        yield accelerator


@contextmanager
def common_random(device: str | torch.device, seed: int) -> Iterator[None]:
    """Within it torch's global random numbers are those of the seed, and after it as before."""
    with forked_random(device):
        torch.manual_seed(seed)
        yield


def random_state(device: str | torch.device) -> tuple[bytes, ...]:
    """Of torch's global random numbers: another one after any was drawn."""
    device = torch.device(device)
    generators = [torch] if device.type == "cpu" else [torch, torch.get_device_module(device)]
    return tuple(generator.get_rng_state().numpy().tobytes() for generator in generators)


def draws_needed(means: Sequence[float]) -> int:
    """How many draws a mean needs to be within `WANTED_ERROR`, by those seen; within limits, as each is a pass. One
    where they agree."""
    centre, scatter = statistics.fmean(means), statistics.stdev(means)
    if not (scatter > 0 and math.isfinite(scatter)):
        return 1
    # The error of a mean of k draws is scatter / k^(1/2).
    error = abs(centre) * WANTED_ERROR
    wanted = (scatter / error) ** 2 if scatter < error * MOST_DRAWS else MOST_DRAWS
    return math.ceil(min(MOST_DRAWS, max(FEWEST_DRAWS, wanted)))
