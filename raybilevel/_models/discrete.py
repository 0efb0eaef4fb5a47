"""Acquisitions over boxes in which some coordinates have a few values only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from botorch.acquisition import AcquisitionFunction
from torch import Tensor

Levels = Mapping[int, Sequence[float]]
"""Coordinates that have a few values, with those."""
NONE: Levels = {}
AtRest = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Of points, shape (..., d): those with every coordinate that is not active at its rest, and which these are, booleans
of that shape."""


def all_active(points: Tensor) -> tuple[Tensor, Tensor]:
    """`AtRest` of a space without conditions."""
    return points, torch.zeros_like(points, dtype=torch.bool)


TRIED = 4
"""Settings of the discrete coordinates whose continuous ones are optimised."""
MOST_NEIGHBOURS = 256


def snapped(points: Tensor, discrete: Levels) -> Tensor:
    """Points, shape (..., d), with the nearest value of each discrete coordinate."""
    found = points.clone()
    for coordinate, values in discrete.items():
        levels = torch.tensor(values, dtype=points.dtype)
        nearest = (points[..., coordinate, None] - levels).abs().argmin(-1)
        found[..., coordinate] = levels[nearest]
    return found


def widened(low: Tensor, high: Tensor, discrete: Levels) -> tuple[Tensor, Tensor]:
    """A box, both shape (d,), with the whole range of the discrete coordinates: a step along them is no small one."""
    low, high = low.clone(), high.clone()
    low[list(discrete)], high[list(discrete)] = 0.0, 1.0
    return low, high


def with_setting(point: Tensor, setting: Mapping[int, float]) -> Tensor:
    """A point, shape (d,), with these values of its discrete coordinates."""
    found = point.clone()
    for coordinate, value in setting.items():
        found[coordinate] = value
    return found


def neighbours(point: Tensor, discrete: Levels) -> Tensor:
    """A point, shape (d,), and those that differ from it in one discrete coordinate, shape (n, d).

    Choosing from these, step by step, is the local search of Casmopolitan (Wan et al. 2021, arXiv:2102.07188) and of
    BoTorch's mixed optimisers.
    """
    found = [point]
    for coordinate, values in discrete.items():
        for value in values:
            if abs(value - point[coordinate].item()) > 1e-9:
                other = point.clone()
                other[coordinate] = value
                found.append(other)
    return torch.stack(found[: MOST_NEIGHBOURS + 1])


def promising(
    acquisition: AcquisitionFunction,
    points: Tensor,
    discrete: Levels,
    at_rest: AtRest = all_active,
    count: int = TRIED,
) -> list[Tensor]:
    """Of points, shape (n, d), and of their neighbours those with the largest acquisition, one for each setting of the
    discrete coordinates."""
    candidates, _ = at_rest(torch.cat([neighbours(point, discrete) for point in snapped(points, discrete)]))
    with torch.no_grad():
        order = acquisition(candidates.unsqueeze(1)).argsort(descending=True, stable=True)
    coordinates = list(discrete)
    chosen: dict[tuple[float, ...], Tensor] = {}
    for candidate in candidates[order]:
        chosen.setdefault(tuple(candidate[coordinates].tolist()), candidate)
        if len(chosen) == count:
            break
    return list(chosen.values())


def covering(points: Tensor, discrete: Levels, seed: int) -> Tensor:
    """A start design, shape (n, d), whose discrete coordinates go through their values in turn, in a random order: n
    points meet every value of a coordinate that has at most n."""
    found, generator = points.clone(), torch.Generator().manual_seed(seed)
    for coordinate, values in discrete.items():
        levels = torch.tensor(values, dtype=points.dtype)
        # Rounded up: the last turn may be cut short.
        turns = -(-len(points) // len(levels))
        order = torch.cat([torch.randperm(len(levels), generator=generator) for _ in range(turns)])
        found[:, coordinate] = levels[order[: len(points)]]
    return found
