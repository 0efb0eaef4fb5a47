"""LAGO (Van Dieren, Vanzan & Nobile 2026, arXiv:2603.02970): two searches that compete for each evaluation.

One maximises the expected improvement of a Gaussian process with gradients, outside of a trust region. The other
minimises a quadratic model within it. The point with the larger improvement, expected or predicted, is evaluated. What
is evaluated within the region goes into the process only where it is farther from its points than a share of the length
scales.

Open choices are made as follows. The quadratic model has the symmetric rank-one update (Nocedal & Wright 2006,
algorithm 6.2). The region is a box, so that outside of it is a union of boxes. It moves to a point found outside where
that is the best. Gradients are those of `lbfgsb-centre`, at the same price.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from botorch.acquisition import LogExpectedImprovement
from scipy.optimize import minimize
from torch import Tensor

from benchmarks.objective import Objective
from benchmarks.reference import MAX_SOLVE, TOLERANCE, differentiated
from raybilevel._models.acquisition import RAW, ascended
from raybilevel._models.gaussian_process import FittedGP, fit
from raybilevel.methods import Default
from raybilevel.space import sobol_points

RESTARTS = 4
FIRST_RADIUS, LEAST_RADIUS, LARGEST_RADIUS = 0.2, 1e-3, 0.5
"""Half the width of the region, in the unit cube. Below the least there is nothing left to refine."""
APART = 0.1
"""Distance in length scales from which on a point of the region goes into the process."""
ACCEPTED, POOR, GOOD = 0.1, 0.25, 0.75
"""Seen over predicted decrease: from where on the region moves, below which it halves, above which it doubles."""


@dataclass(frozen=True)
class Point:
    """x in the unit cube, shape (d,), F there and its gradient."""

    x: Tensor
    value: float
    gradient: Tensor


@dataclass(frozen=True)
class Region:
    """A box around its centre, and the quadratic model in it; hessian of shape (d, d)."""

    centre: Point
    hessian: Tensor
    radius: float = FIRST_RADIUS

    @classmethod
    def around(cls, centre: Point) -> Region:
        """Whose first step, along the gradient, is as long as the radius."""
        return cls(centre, centre.gradient.norm() / FIRST_RADIUS * torch.eye(len(centre.x)).to(centre.x))

    @property
    def box(self) -> tuple[Tensor, Tensor]:
        return (self.centre.x - self.radius).clamp(0, 1), (self.centre.x + self.radius).clamp(0, 1)

    @property
    def open(self) -> bool:
        return self.radius >= LEAST_RADIUS

    def proposed(self) -> tuple[Tensor, float]:
        """The minimiser of the model in the box, and how far F is predicted to fall."""
        low, high = self.box

        def model(x: Any) -> tuple[float, Any]:
            step = torch.from_numpy(x) - self.centre.x
            bent = self.hessian @ step
            return (self.centre.gradient @ step + step @ bent / 2).item(), (self.centre.gradient + bent).numpy()

        bounds = list(zip(low.tolist(), high.tolist(), strict=True))
        found = minimize(model, self.centre.x.numpy(), jac=True, method="L-BFGS-B", bounds=bounds)
        return torch.from_numpy(found.x).clamp(low, high), -float(found.fun)

    def told(self, point: Point, predicted: float) -> Region:
        """After the proposed point was evaluated."""
        step = point.x - self.centre.x
        left = point.gradient - self.centre.gradient - self.hessian @ step
        along = left @ step
        hessian = self.hessian
        if along.abs() > 1e-8 * left.norm() * step.norm():
            hessian = hessian + torch.outer(left, left) / along
        ratio = (self.centre.value - point.value) / predicted
        radius = self.radius
        if ratio < POOR:
            radius /= 2
        elif ratio > GOOD and step.abs().max() > 0.8 * radius:
            radius = min(2 * radius, LARGEST_RADIUS)
        centre = point if ratio > ACCEPTED else self.centre
        return Region(centre, hessian, radius)


@dataclass(frozen=True)
class Lago:
    """All that was evaluated, and of it what the process has."""

    points: tuple[Point, ...]
    global_points: tuple[Point, ...]
    region: Region

    @classmethod
    def of(cls, points: Sequence[Point]) -> Lago:
        return cls(tuple(points), tuple(points), Region.around(min(points, key=lambda p: p.value)))

    @property
    def best(self) -> float:
        return min(point.value for point in self.points)

    def process(self) -> FittedGP:
        x = torch.stack([point.x for point in self.global_points])
        values = torch.tensor([point.value for point in self.global_points], dtype=torch.double)
        gradients = {i: point.gradient for i, point in enumerate(self.global_points)}
        return fit(x, values, gradients, infer_gradient_noise=False)

    def explored(self, process: FittedGP, seed: int) -> tuple[Tensor, float]:
        """The point outside of the region with the largest expected improvement, and that, in units of F."""
        best = (self.best - process.shift) / process.scale
        acquisition = LogExpectedImprovement(process.model, best_f=best, maximize=False)
        raw = sobol_points(len(self.points[0].x), RAW, seed)
        away = (raw - self.region.centre.x).abs() > self.region.radius
        raw = raw[away.any(1)]
        with torch.no_grad():
            order = acquisition(raw.unsqueeze(1)).argsort(descending=True, stable=True)
        found = [ascended(acquisition, *self.slab(start), [start]) for start in raw[order[:RESTARTS]]]
        with torch.no_grad():
            expected = acquisition(torch.stack(found).unsqueeze(1)).exp()
        return found[int(expected.argmax())], process.scale * expected.max().item()

    def slab(self, start: Tensor) -> tuple[Tensor, Tensor]:
        """The box on that side of the region on which a point is farthest from it."""
        low, high = torch.zeros_like(start), torch.ones_like(start)
        away = start - self.region.centre.x
        side = int(away.abs().argmax())
        if away[side] > 0:
            low[side] = self.region.centre.x[side] + self.region.radius
        else:
            high[side] = self.region.centre.x[side] - self.region.radius
        return low, high

    def explored_at(self, point: Point) -> Lago:
        region = self.region if point.value >= self.best else Region.around(point)
        return Lago((*self.points, point), (*self.global_points, point), region)

    def refined_at(self, point: Point, predicted: float, process: FittedGP) -> Lago:
        lengths = process.model.lengths
        nearest = min(((point.x - other.x) / lengths).norm().item() for other in self.global_points)
        kept = (*self.global_points, point) if nearest >= APART else self.global_points
        return replace(
            self, points=(*self.points, point), global_points=kept, region=self.region.told(point, predicted)
        )


def lago(objective: Objective, seed: int, tolerance: float = TOLERANCE, max_solve: float = MAX_SOLVE) -> None:
    """From the points from which the default method starts, each with a gradient."""

    def evaluated(x: Tensor, origin: str) -> Point:
        return Point(x, *differentiated(objective, x, {"origin": origin}, tolerance, max_solve))

    starts = Default().start_design(objective.space, 1, seed)
    state = Lago.of([evaluated(x, "start") for x in starts])
    while True:
        process = state.process()
        x, expected = state.explored(process, seed + 1000 * len(state.points))
        nearer, predicted = state.region.proposed()
        if state.region.open and predicted > expected:
            state = state.refined_at(evaluated(nearer, "region"), predicted, process)
        else:
            state = state.explored_at(evaluated(x, "global"))
