"""Whether the gradients of both levels are the derivatives of their values, before anything is trained."""

from __future__ import annotations

import copy
import itertools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from raybilevel._lower.functions import LevelGradient
from raybilevel._lower.levels import Levels
from raybilevel._lower.precision import Narrowest, full_precision
from raybilevel._lower.variables import UpperVariables, trainable
from raybilevel.problem import Batch, BilevelProblem, Level, make_batches

logger = logging.getLogger(__name__)

ABOVE_ROUNDING, LONGER, LENGTHS, FEWEST_LENGTHS = 100.0, 4.0, 6, 3
"""The change of a loss over the shortest length, in units of its rounding; how much longer the next one is; how many
lengths are tried, and how many must fit for a verdict."""
LONGEST = 0.02
"""Of the weights' norm, or of the unit cube. A loss may be far from linear over more."""
TOLERANCE = 0.1
"""Of a slope. Smooth losses and rectifiers are within 0.03 at some length (measured)."""
SMALL = 0.03
"""Of the largest gradient of a tensor, that of one which counts for less."""
MOVED = 0.01
"""So far weights and hyperparameters are moved off a kink at the start, e.g. of rectifiers of zeros."""
FAR = (0.1, -0.1, 0.3, -0.3, 1.0, -1.0)
"""How far weights are looked at, in units of their norm, where a gradient is 0."""
GROUPS = 16
LEVELS: tuple[Level, ...] = ("lower", "upper")
MOST_WEIGHTS_IN_DOUBLE = 20_000_000


class Contradiction(NamedTuple):
    """A gradient that is not the derivative of its loss.

    level: "lower" or "upper".
    coordinate: of x; None for the weights.
    share: of the change that the gradient promises, what is seen over the shortest length; infinite if that is 0.
    """

    level: Level
    coordinate: int | None
    share: float


def contradictions(
    problem: BilevelProblem,
    model: nn.Module,
    variables: UpperVariables,
    config: Mapping[str, Any],
    x: Tensor,
    coordinates: Sequence[int] = (),
) -> list[Contradiction]:
    """Gradients on a first batch that the losses' own values contradict, as those do that are passed straight through
    a rounding, or miss a part that is detached. About a dozen evaluations of a loss where there are none.

    It is done in double precision, in which even a fine quantisation is a step, if the problem can be computed so.

    x:           shape (p,).
    coordinates: of x, which are looked at; many of them in `GROUPS` groups.
    """
    single = copy.copy(problem)

    def one_batch(level: Level, generator: torch.Generator | None) -> Iterator[Batch]:
        return itertools.islice(make_batches(problem, level, None, config), 1)

    single.batches = one_batch  # type: ignore[method-assign]
    weights = sum(weight.numel() for weight in model.parameters())
    # An upper-level module stays as it is: x is its parameters.
    wide = [torch.double] if weights <= MOST_WEIGHTS_IN_DOUBLE and variables.module is None else []
    for dtype in dict.fromkeys([*wide, problem.dtype]):
        single.dtype = dtype
        try:
            levels = Levels(single, copy.deepcopy(model).to(dtype), variables, config)
            with full_precision():
                return [found for level in LEVELS for found in of_level(levels, level, x, coordinates)]
        except Exception as error:  # whatever a problem raises at tensors of another precision than its own
            logger.debug("%s in %s: %s", type(problem).__name__, dtype, error)
    return []


def of_level(levels: Levels, level: Level, x: Tensor, coordinates: Sequence[int]) -> Iterator[Contradiction]:
    probed = Probed.at(levels, level, x, coordinates)
    in_weights = probed.in_weights()
    if in_weights is not None:
        yield in_weights
    yield from probed.in_hyperparameters(coordinates)


@dataclass(frozen=True)
class Probed:
    """A level near the start, off the kinks that may lie there.

    here: its value and gradients at x, shape (p,), and y, shape (n,).
    eps:  of the precision in which it is computed.
    """

    levels: Levels
    level: Level
    x: Tensor
    y: Tensor
    here: LevelGradient
    eps: float

    @classmethod
    def at(cls, levels: Levels, level: Level, x: Tensor, coordinates: Sequence[int]) -> Probed:
        chance, y = torch.Generator().manual_seed(0), levels.y
        x, y = x.to(levels.problem.device).clone(), y + MOVED * draw(y, chance)
        inside = [coordinate for coordinate in coordinates if MOVED < x[coordinate] < 1 - MOVED]
        x[inside] += MOVED * draw(x[inside], chance).clamp(-1, 1)
        levels.value(level, x, y)  # fetches the batch, whose own precision is not that of the loss
        with Narrowest(y.dtype) as computed:
            here = levels.gradient(level, x, y)
        return cls(levels, level, x, y, here, torch.finfo(computed.dtype).eps)

    @property
    def rounding(self) -> float:
        return self.eps * abs(self.here.value)

    def in_weights(self) -> Contradiction | None:
        gradient = torch.where(self.here.in_y.isfinite(), self.here.in_y, 0)
        if not gradient.any():
            return None if self.constant() else Contradiction(self.level, None, math.inf)
        unit = self.y.norm().item()
        for along in directions(gradient, trainable(self.levels.model)):
            share = self.share(torch.zeros_like(self.x), along, gradient.dot(along).item(), unit)
            if share is not None:
                return Contradiction(self.level, None, share)
        return None

    def in_hyperparameters(self, coordinates: Sequence[int]) -> Iterator[Contradiction]:
        for group in (coordinates[start::GROUPS] for start in range(GROUPS)):
            if self.of_group(group) is not None:
                for coordinate in group:
                    share = self.of_group([coordinate])
                    if share is not None:
                        yield Contradiction(self.level, coordinate, share)

    def of_group(self, group: Sequence[int]) -> float | None:
        """As `contradicted`, along coordinates of x that have an equal part each in the slope."""
        in_x, along = self.here.in_x, torch.zeros_like(self.x)
        steep = [coordinate for coordinate in group if in_x[coordinate] != 0 and in_x[coordinate].isfinite()]
        if not steep:
            return None
        along[steep] = 1 / in_x[steep]
        length = along.norm().item()
        return self.share(along / length, torch.zeros_like(self.y), len(steep) / length, 1.0)

    def share(self, in_x: Tensor, in_y: Tensor, slope: float, unit: float) -> float | None:
        """As `contradicted`, along a direction. unit: size of what is moved."""

        def value(t: float) -> float:
            return self.levels.value(self.level, self.x + t * in_x, self.y + t * in_y)

        return contradicted(value, slope, self.rounding, self.eps * unit, LONGEST * unit)

    def constant(self) -> bool:
        """Whether the level has one value at several weights, some of them far away, as it should where its gradient is
        0. An accuracy has such a gradient as well."""
        along = draw(self.y, torch.Generator().manual_seed(1))
        along *= self.y.norm() / along.norm()
        values = [self.levels.value(self.level, self.x, self.y + factor * along) for factor in FAR]
        most = ABOVE_ROUNDING * self.rounding
        return all(abs(value - self.here.value) <= most for value in values if math.isfinite(value))


def draw(like: Tensor, chance: torch.Generator) -> Tensor:
    """Normal random numbers, the same on each device."""
    return torch.randn(like.shape, generator=chance, dtype=torch.double).to(like)


def directions(gradient: Tensor, weights: Sequence[Tensor]) -> Iterator[Tensor]:
    """Of length 1 along a gradient, shape (n,), first in the earlier half of a model's weights, and then in the later:
    what a rounding between two layers makes wrong is the gradient of the earlier. Every tensor has an equal part in the
    slope, unless its gradient is far below the others'."""
    parts = gradient.split([weight.numel() for weight in weights])
    squares = [part.dot(part).item() for part in parts]
    largest, middle = max(squares), math.ceil(len(parts) / 2)
    for half in (range(middle), range(middle, len(parts))):
        direction = torch.cat([
            part / max(square, SMALL**2 * largest) if index in half else torch.zeros_like(part)
            for index, (part, square) in enumerate(zip(parts, squares, strict=True))
        ]) if largest else gradient  # fmt: skip
        if direction.any():
            yield direction / direction.norm()


def contradicted(
    value: Callable[[float], float], slope: float, rounding: float, resolution: float, longest: float
) -> float | None:
    """Which share of a slope the values of a loss show, if central differences contradict it over every length; None if
    one of them agrees, if the slope is 0 or not finite, or if rounding leaves too few lengths up to `longest`.

    A loss with kinks agrees over short lengths. One with steps, or another derivative, does not.

    rounding:   of the loss.
    resolution: of the lengths, by the rounding of what is moved: a loss may be far less than its slope.
    """
    if not slope or not math.isfinite(slope):
        return None
    shortest = ABOVE_ROUNDING * max(rounding / abs(slope), resolution)
    lengths = [length for k in range(LENGTHS) if (length := shortest * LONGER**k) <= longest]
    shares = []
    for length in lengths:
        share = (value(length) - value(-length)) / (2 * length * slope)
        if not math.isfinite(share) or abs(share - 1) <= TOLERANCE * max(1.0, abs(share)):
            return None
        shares.append(share)
    return shares[0] if len(shares) >= FEWEST_LENGTHS else None
