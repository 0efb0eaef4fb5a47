"""Batches of DataLoaders, the same in the same order each time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from raybilevel._dependent import seeded


def in_order(loader: Iterable[Any]) -> Iterator[Any]:
    """The batches of a loader without its shuffling. Random augmentations are drawn from a fixed seed.

    A sampler of the user's own stays, and draws from that seed, too.
    """
    if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset) and loader.batch_size:
        sampler = None if shuffles(loader) else loader.sampler
        # In this process: workers would be started for each pass.
        loader = DataLoader(loader.dataset, loader.batch_size, sampler=sampler, collate_fn=loader.collate_fn)
    with seeded("pass"):
        iterator = iter(loader)
    number = 0
    while True:
        # Between batches the random numbers are those of the caller.
        with seeded(f"batch {number}"):
            try:
                batch = next(iterator)
            except StopIteration:
                return
        yield batch
        number += 1


def shuffles(loader: DataLoader[Any]) -> bool:
    """Whether a loader takes all examples, in whatever order."""
    return isinstance(loader.sampler, torch.utils.data.RandomSampler | torch.utils.data.SequentialSampler)
