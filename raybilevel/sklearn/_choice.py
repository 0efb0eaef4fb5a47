"""The choice of penalties: one value that all groups share, and from there as far apart as the examples support."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from raybilevel._models.generalisation import Mode, modes, penalised_minimum, selected
from raybilevel._models.shrinkage import off_mean
from raybilevel.sklearn._folds import FoldLoss

# A decade apart, from LOWEST to HIGHEST.
SHARED_VALUES = 9
FEWEST_GROUPS = 4
"""As of a group of hyperparameters in a search (`Space.groups`)."""
# Three a decade from 1000 to 0.001, the strongest first: the way to weaker ones ends early (BEHIND).
STRENGTHS = tuple(10 ** (3 - i / 3) for i in range(19))
BEHIND = 5.0
"""Weaker strengths are not tried once the log evidence is so much below the best, in nats."""


@dataclass(frozen=True)
class Choice:
    """Points of the unit cube, shape (d,); `supported` of the coordinates are determined by the examples."""

    x: Tensor
    shared: Tensor
    supported: float


def choose(loss: FoldLoss, generalise: bool, repeats: float = 1.0) -> Choice:
    """What is expected to be best on new data; without `generalise`, a local minimum of F.

    repeats: how often an example is held out. Chance in F is that of the examples, however often.
    """
    d = loss.penalties.dimension
    shared = best_shared(loss, d)
    if d == 1:
        return Choice(shared, shared, 1.0)
    group = (tuple(range(d)),)
    if d < FEWEST_GROUPS or not generalise:
        x = penalised_minimum(loss, group, 0.0, torch.zeros_like(shared), torch.ones_like(shared), shared)
        return Choice(x, shared, float(d))
    seen = off_mean(torch.eye(d, dtype=torch.double), group)
    found: list[Mode] = []
    for mode in modes(loss, group, round(loss.examples / repeats), shared, seen, STRENGTHS, reach=1.0):
        found.append(mode)
        if mode.evidence < max(m.evidence for m in found) - BEHIND:
            break
    mode = found[selected([mode.evidence for mode in found])]
    return Choice(mode.x, shared, mode.supported)


def best_shared(loss: FoldLoss, d: int) -> Tensor:
    """The point of the diagonal with the lowest F: of a grid, and then between its neighbours."""

    def on_diagonal(value: float) -> float:
        return loss.upper(torch.full((d,), value, dtype=torch.double))

    grid = torch.linspace(0, 1, SHARED_VALUES, dtype=torch.double).tolist()
    best = min(range(len(grid)), key=lambda i: on_diagonal(grid[i]))
    bounds = (grid[max(0, best - 1)], grid[min(len(grid) - 1, best + 1)])
    # A hundredth of the cube is a factor of 1.2 in the penalty.
    finer = minimize_scalar(on_diagonal, bounds=bounds, method="bounded", options={"xatol": 1e-2})
    # It looks between its bounds only, so the end of a grid may be lower, and F need not have one minimum there.
    value = finer.x if finer.fun <= on_diagonal(grid[best]) else grid[best]
    return torch.full((d,), float(value), dtype=torch.double)
