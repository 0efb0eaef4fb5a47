"""Whether a level is the same function at each call: the same data in the same order, the same loss on them."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import logging
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler

from raybilevel.errors import ProblemError
from raybilevel.problem import Batch, BilevelProblem, Level, leaves, make_batches
from raybilevel.search._calls import calling

logger = logging.getLogger(__name__)

LEVELS = ("lower", "upper")
LEVELS_ARE = "the levels are 'lower', the training data, and 'upper', the validation data"
LOOK_S = 0.25
"""So long a pass over a level's data is followed to find its last batch."""


class WatchedLevel(str):
    """The name of a level that notes what it is compared with."""

    def __new__(cls, level: Level) -> WatchedLevel:
        made = super().__new__(cls, level)
        made.compared = set()
        return made

    compared: set[str]

    def __eq__(self, other: object) -> bool:
        if isinstance(other, str):
            self.compared.add(str(other))
        # A name that is no string is not compared with a level.
        return str.__eq__(self, other) if isinstance(other, str) else False

    # str has a __ne__ of its own, which would note nothing.
    def __ne__(self, other: object) -> bool:
        return not self == other

    # A class that defines __eq__ has no hash unless it says so.
    __hash__ = str.__hash__

    def startswith(self, prefix: str | tuple[str, ...], *between: Any) -> bool:
        self.compared.update([prefix] if isinstance(prefix, str) else prefix)
        return super().startswith(prefix, *between)


SingleExamples = Callable[[WatchedLevel, Batch], Sequence[float]]


@dataclass(frozen=True)
class Look:
    """A pass over a level's data, or its beginning.

    last:   the last batch that was seen.
    whole:  it is that of the whole pass.
    digest: of all batches that were seen.
    """

    first: Batch
    last: Batch
    count: int
    whole: bool
    digest: str


def look_at(
    batches: Any,
    what: str,
    problem: BilevelProblem,
    most: int | None = None,
    advise: Callable[[Exception], str] = lambda error: "",
) -> Look:
    """Go through batches, most of them where that is given, else for as long as `LOOK_S`.

    Raises:
        ProblemError: it is no iterable, raises something, or yields what is no batch.
    """
    name, first, last, count, whole = type(problem).__name__, None, None, 0, True
    digest = hashlib.blake2b()
    with calling(problem, what, advise):
        if batches is None:
            raise ProblemError(f"{name}.{what} returned None; return an iterable of batches, or yield them")
        until = time.monotonic() + LOOK_S
        iterator: Iterator[Batch] = iter(batches)
        # One batch more than `most` tells whether the pass ends there.
        for raw in iterator if most is None else itertools.islice(iterator, most + 1):
            if count and (time.monotonic() > until if most is None else count == most):
                whole = False
                break
            first, last, count = raw if count == 0 else first, raw, count + 1
            for leaf in leaves(raw):
                digest.update(as_bytes(leaf))
    if count == 0:
        raise ProblemError(f"{name}.{what} yields no tensors: it is empty; is it an iterator that was used up?")
    check_batch(first, f"{name}.{what}")
    return Look(first, last, count, whole, digest.hexdigest())


def check_batch(batch: Batch, what: str) -> None:
    """Whether a batch is of a kind whose tensors can be found and moved. what: yields it.

    Raises:
        ProblemError: it is not.
    """
    kinds = "a batch is a tensor, or tuples, lists and dicts of tensors, nested"
    found = "beside its tensors" if any(True for _ in leaves(batch)) else "no tensors but"
    for part in opaque(batch):
        kind = type(part).__name__
        if isinstance(part, np.ndarray):
            raise ProblemError(f"{what} yields {found} {kind}; {kinds}; use torch.as_tensor(array)")
        if dataclasses.is_dataclass(part) or callable(getattr(part, "to", None)):
            raise ProblemError(
                f"{what} yields {found} {kind}; {kinds}, which are moved to the device; yield the tensors themselves, "
                f"e.g. (batch.x, batch.y), and make the {kind} of them in the losses"
            )
    if found == "no tensors but":
        raise ProblemError(f"{what} yields no tensors but {type(batch).__name__}; {kinds}")


def opaque(batch: Batch) -> Iterator[Any]:
    """What is neither a tensor nor a collection of them."""
    if isinstance(batch, Mapping):
        batch = tuple(batch.values())
    if isinstance(batch, tuple | list):
        for part in batch:
            yield from opaque(part)
    elif not isinstance(batch, Tensor):
        yield batch


def as_bytes(tensor: Tensor) -> bytes:
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    # As bytes before NumPy has it, which knows no bfloat16.
    return str((tuple(tensor.shape), tensor.dtype)).encode() + flat.view(torch.uint8).numpy().tobytes()


def check_same_data(problem: BilevelProblem, level: WatchedLevel, config: Mapping[str, Any]) -> Look:
    """A look at a level's data, after a second one.

    Raises:
        ProblemError: there is none, or the second pass differs from the first.
    """
    what = f"batches({str(level)!r}, None)"

    def advise(error: Exception) -> str:
        if level.compared and not level.compared & set(LEVELS):
            return f"it compares its level with {quoted(level.compared)}; {LEVELS_ARE}"
        return LEVELS_ARE if isinstance(error, KeyError) and str(error) == repr(str(level)) else ""

    def look(most: int | None = None) -> Look:
        with calling(problem, what, advise):
            batches = make_batches(problem, level, None, config)  # type: ignore[arg-type]
        if most is None:
            warn_of_left_out(batches, f"{type(problem).__name__}.{what}")
        return look_at(batches, what, problem, most, advise)

    one = look()
    # By count: the clock would end the two passes at different batches.
    two = look(one.count)
    if (one.count, one.whole, one.digest) != (two.count, two.whole, two.digest):
        raise ProblemError(
            f"{type(problem).__name__}.{what} yields other data, or in another order, at the second call; without a "
            "generator all data come in a fixed order and without random augmentation, e.g. "
            "DataLoader(..., shuffle=generator is not None, generator=generator)"
        )
    return one


def warn_of_left_out(batches: Any, what: str) -> None:
    """A loader that drops its last batch leaves out examples of the level's mean."""
    # A loader makes such a sampler of its own arguments, too.
    sampler = getattr(batches, "batch_sampler", None)
    if not isinstance(sampler, BatchSampler) or not sampler.drop_last:
        return
    try:
        examples, size = len(sampler.sampler), sampler.batch_size  # type: ignore[arg-type]
    except TypeError:  # a data set without a length
        return
    if size and examples % size:
        logger.warning(
            "%s: drop_last leaves out %d of %d examples, of which the level is the mean; use drop_last only with a "
            "generator", what, examples % size, examples,
        )  # fmt: skip


def check_level_names(problem: BilevelProblem, data: Mapping[WatchedLevel, Look]) -> None:
    """Whether `batches` knows the levels by their names.

    Raises:
        ProblemError: it asks for other names, and both levels have the same data.
    """
    compared = set().union(*(level.compared for level in data))
    if same_data(data) and compared and not compared & set(LEVELS):
        raise ProblemError(f"{type(problem).__name__}.batches compares its level with {quoted(compared)}; {LEVELS_ARE}")


def same_data(data: Mapping[WatchedLevel, Look]) -> bool:
    one, other = data.values()
    return one.digest == other.digest


def warn_of_same_data(problem: BilevelProblem, data: Mapping[WatchedLevel, Look], single: SingleExamples) -> None:
    """Warn of data that are the same at both levels, if both losses are of them: a problem may keep its data elsewhere,
    or tell them apart by masks, and yield the same at both levels.

    single: a level's loss on single examples of a batch; none where it is not made of examples.
    """
    if not same_data(data) or is_index(next(iter(data.values())).first):
        return
    for level, look in data.items():
        losses = single(level, look.first)
        # Of no data, or of masked ones, they are equal, or the mean over none.
        if not all(map(math.isfinite, losses)) or len(set(losses)) < 2:
            return
    logger.warning(
        "%s.batches yields the same data for both levels, so that F is a training loss; %s",
        type(problem).__name__, LEVELS_ARE,
    )  # fmt: skip


def is_index(batch: Batch) -> bool:
    """Whether a batch has a whole number for each example and nothing else: these may stand for data elsewhere."""
    return all(leaf.dim() < 2 and not leaf.is_floating_point() for leaf in leaves(batch))


def quoted(names: Collection[str]) -> str:
    return ", ".join(map(repr, sorted(names)))
