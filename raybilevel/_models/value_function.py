"""v_hat: a Gaussian process of the lower level's optimal value v(x) = min_y f(x, y)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raybilevel._models.gaussian_process import FittedGP, fit
from raybilevel.search_state import Training


@dataclass(frozen=True)
class ValueFunction:
    """The posterior of v given trained values and, by Danskin's theorem, dv/dx = df/dx at the trained weights."""

    process: FittedGP

    def mean(self, unit: Tensor) -> Tensor:
        """v_hat at a point of the unit cube, shape (d,) -> (), differentiable."""
        return self.process.mean(unit)

    def deviation(self, unit: Tensor) -> Tensor:
        return self.process.deviation(unit)


def fit_value_function(
    trainings: Sequence[Training], near: Tensor, gradients: bool, max_rows: int, unordered: Sequence[int] = ()
) -> ValueFunction:
    """v_hat of finished trainings; where rows run out, gradients are kept for the points nearest to `near`, and with
    them at most half of the rows are values (`thinned`)."""
    if gradients:
        trainings = thinned(trainings, near, max_rows // 2)
    x = torch.tensor([t.unit for t in trainings], dtype=torch.double)
    values = torch.tensor([t.lower_loss for t in trainings], dtype=torch.double)
    # A gradient takes d rows.
    kept = nearest(x, near, (max_rows - len(x)) // x.shape[1]) if gradients else []
    observed = {i: torch.tensor(trainings[i].lower_gradient, dtype=torch.double) for i in kept}
    # With exact gradients few rows tell the length scales: twice as many predicted no better, at three times the cost.
    iterations, rows = (25, 120) if gradients else (50, 250)
    process = fit(
        x, values, observed, max_iterations=iterations, max_rows=rows, infer_gradient_noise=False, categorical=unordered
    )
    return ValueFunction(process)


def thinned(trainings: Sequence[Training], near: Tensor, most: int) -> Sequence[Training]:
    """At most so many trainings, in their order: one half the nearest to a point of the unit cube, the other evenly
    spaced among the rest, which are spread over the box."""
    if len(trainings) <= most:
        return trainings
    x = torch.tensor([t.unit for t in trainings], dtype=torch.double)
    close = nearest(x, near, most - most // 2)
    rest = sorted(set(range(len(trainings))) - set(close))
    spread = torch.linspace(0, len(rest) - 1, most // 2).round().long().tolist()
    return [trainings[i] for i in sorted({*close, *(rest[i] for i in spread)})]


def nearest(x: Tensor, near: Tensor, count: int) -> list[int]:
    """Indices of the `count` rows of x nearest to a point, in their order."""
    distance = (x - near).square().sum(-1)
    chosen: list[int] = distance.argsort(stable=True)[: max(0, count)].sort().values.tolist()
    return chosen
