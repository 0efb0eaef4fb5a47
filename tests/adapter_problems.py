"""What tests of adapters share: small convex data, and hypergradients against differences of trained F."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from raybilevel import BilevelSearch
from raybilevel._adapters.adapter import Adapter
from raybilevel._lower.own_loop import OwnTraining
from raybilevel._tree import leaves, named, replaced

CLASSES, FEATURES, ROWS = 3, 4, 60


def examples(seed: int = 0, rows: int = ROWS, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Three classes that overlap: x of shape (rows, 4), y of shape (rows,)."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(CLASSES, FEATURES, generator=torch.Generator().manual_seed(9))
    y = torch.arange(rows) % CLASSES
    return (centres[y] + torch.randn(rows, FEATURES, generator=generator)).to(dtype), y


def with_gradients(problem: Adapter, space: Mapping[str, Any]) -> set[str]:
    """The hyperparameters that a search of the problem's own metric has gradients in."""
    search = BilevelSearch(problem, space, metric=problem.upper_metric)
    return {parameter.name for parameter in search.space.parameters if parameter.smooth}


def ended(problem: Adapter, config: Mapping[str, Any]) -> OwnTraining:
    trained = problem.train_model(config)
    return OwnTraining(problem, config, trained.model, trained.passes)


def hypergradient(problem: Adapter, config: Mapping[str, Any]) -> dict[str, float]:
    """dF/dx at trained weights by the implicit function theorem and a dense Hessian, by name, per unit of each x."""
    end = ended(problem, config)
    levels, x = end.levels, end.variables.x
    around, upper = levels.linearise(x, levels.y), levels.upper(x, levels.y)
    hessian = torch.stack([around.hessian(direction) for direction in torch.eye(len(levels.y), dtype=levels.y.dtype)])
    # Softmax has directions in which nothing changes.
    solution = torch.linalg.pinv(hessian, rcond=1e-9) @ upper.in_y
    found = upper.in_x - around.mixed(solution)
    return dict(zip(map(named, end.variables.paths), found.tolist(), strict=True))


def differences(problem: Adapter, config: Mapping[str, Any], names: Collection[str], step: float) -> dict[str, float]:
    """Central differences of F at trained weights. step: relative."""
    found = {}
    for path, value in leaves(config).items():
        if named(path) in names:
            h = step * value
            ahead, behind = (ended(problem, replaced(config, {path: value + sign * h})).upper() for sign in (1, -1))
            found[named(path)] = (ahead - behind) / (2 * h)
    return found
