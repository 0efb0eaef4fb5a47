"""Whether a level is the same function at each call: the same data in the same order, the same loss on them."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raybilevel.errors import ProblemError
from raybilevel.problem import Batch, BilevelProblem, Level, leaves, make_batches
from raybilevel.search._calls import calling
from raybilevel.search._fresh import same

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
        return str.__eq__(self, other) if isinstance(other, str) else False

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


@dataclass(frozen=True)
class Look:
    """A pass over a level's data, or its beginning.

    last:  the last batch that was seen.
    whole: it is that of the whole pass.
    """

    first: Batch
    last: Batch
    count: int
    whole: bool


def look_at(batches: Any, what: str, problem: BilevelProblem, most: int | None = None) -> Look:
    """Go through batches, most of them where that is given, else for as long as `LOOK_S`.

    Raises:
        ProblemError: it is no iterable, raises something, or yields what is no batch.
    """
    name, first, last, count, whole = type(problem).__name__, None, None, 0, True
    with calling(problem, what):
        if batches is None:
            raise ProblemError(f"{name}.{what} returned None; return an iterable of batches, or yield them")
        until = time.monotonic() + LOOK_S
        iterator: Iterator[Batch] = iter(batches)
        for raw in iterator if most is None else itertools.islice(iterator, most + 1):
            if count and (time.monotonic() > until if most is None else count == most):
                whole = False
                break
            first, last, count = raw if count == 0 else first, raw, count + 1
    if count == 0:
        raise ProblemError(f"{name}.{what} yields no tensors: it is empty; is it an iterator that was used up?")
    if not any(True for _ in leaves(first)):
        raise ProblemError(
            f"{name}.{what} yields no tensors but {type(first).__name__}; a batch is a tensor, or tuples, lists and "
            "dicts of tensors, nested"
        )
    return Look(first, last, count, whole)


def check_same_data(problem: BilevelProblem, level: WatchedLevel, config: Mapping[str, Any]) -> Batch:
    """The first batch of a level, after looking at its data twice.

    Raises:
        ProblemError: there is none, or the second pass differs from the first.
    """
    what = f"batches({str(level)!r}, None)"

    def look(most: int | None = None) -> Look:
        with calling(problem, what):
            batches = make_batches(problem, level, None, config)  # type: ignore[arg-type]
        return look_at(batches, what, problem, most)

    one = look()
    two = look(one.count)
    if (one.count, one.whole) != (two.count, two.whole) or not (
        same_batch(one.first, two.first) and same_batch(one.last, two.last)
    ):
        raise ProblemError(
            f"{type(problem).__name__}.{what} yields other data, or in another order, at the second call; without a "
            "generator all data come in a fixed order and without random augmentation, e.g. "
            "DataLoader(..., shuffle=generator is not None, generator=generator)"
        )
    return one.first


def same_batch(one: Batch, other: Batch) -> bool:
    pairs = itertools.zip_longest(leaves(one), leaves(other))
    return all(a is not None and b is not None and same(a, b) for a, b in pairs)


def check_level_names(problem: BilevelProblem, first: dict[WatchedLevel, Batch]) -> None:
    """Whether `batches` knows the levels by their names.

    first: the first batch of each.

    Raises:
        ProblemError: it asks for other names, and both levels have the same data.
    """
    compared = set().union(*(level.compared for level in first))
    if compared and not compared & {"lower", "upper"} and same_batch(*first.values()):
        raise ProblemError(
            f"{type(problem).__name__}.batches compares its level with {', '.join(map(repr, sorted(compared)))}; the "
            "levels are 'lower', the training data, and 'upper', the validation data"
        )


@dataclass(frozen=True)
class Measured:
    """A loss and its gradients: in each searched hyperparameter, None where it does not depend on it, and in the
    weights, shape (n,)."""

    loss: Tensor
    in_x: tuple[Tensor | None, ...]
    in_y: Tensor


def check_same_loss(problem: BilevelProblem, level: Level, one: Measured, two: Measured) -> None:
    """Whether two evaluations of a loss at one point agree.

    Sums in another order, as some kernels of accelerators take them, differ by rounding: by sqrt(n) eps for n terms, so
    that 100 eps allow for n = 10,000. A descent differentiates by differences over a length of sqrt(eps), so that more
    would drown them.

    Raises:
        ProblemError: they differ by more.
    """
    pairs = [("it", one.loss, two.loss), ("its gradient in the weights", one.in_y, two.in_y)]
    pairs += [("its gradient in the hyperparameters", a, b) for a, b in zip(one.in_x, two.in_x, strict=True)
              if a is not None and b is not None]  # fmt: skip
    for what, a, b in pairs:
        scale = max(a.norm().item(), b.norm().item())
        if not (a - b).norm().item() <= 100 * torch.finfo(a.dtype).eps * scale and bool((a - b).isfinite().all()):
            raise ProblemError(
                f"{type(problem).__name__}.{level}_loss is not the same twice: on the same batch, with the model in "
                f"eval mode, {what} is {a.norm().item():.6g} and then {b.norm().item():.6g} (norms); draw no random "
                "numbers unless model.training (F.dropout needs training=model.training), or draw them from a "
                "torch.Generator that is seeded anew at each call"
            )
