"""The first-order reference: L-BFGS-B on hypergradients of the implicit function theorem."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from scipy.optimize import minimize
from torch import Tensor

from benchmarks.objective import BudgetSpent, Objective
from raybilevel._lower.levels import Levels, as_tensors
from raybilevel._lower.training import load_checkpoint
from raybilevel.problem import Level
from raybilevel.space import flatten, sobol_points

Tensors = list[Tensor]


class ImplicitGradient:
    """dF(x, y*(x))/dx = -(d2f/dx dy) q with (d2f/dy2) q = dF/dy, at one trained point.

    q comes from conjugate gradients, ended at a relative residual of `tolerance`, after `max_solve` trainings' worth of
    gradient evaluations, or where the curvature is not positive (the training stopped at no minimum). A product with
    the Hessian counts as one gradient evaluation, in favour of this method.
    """

    def __init__(self, objective: Objective, unit: Tensor, checkpoint: bytes, tolerance: float, max_solve: float):
        problem = objective.problem
        self.objective, self.unit, self.tolerance = objective, unit, tolerance
        self.max_products = max(3, int(max_solve * objective.passes_per_training))
        model = problem.model().to(problem.device, problem.dtype)
        model.load_state_dict(load_checkpoint(checkpoint)["model"])
        self.levels = Levels(problem, model)
        self.weights = [w for w in model.parameters() if w.requires_grad]
        config = objective.space.to_config(unit)
        self.config: Mapping[str, Any] = config
        tensors = as_tensors(config, problem, requires_grad=True)
        self.hyperparameters = tensors
        flat = flatten(tensors)
        self.searched = [flat[p.path] for p in objective.space.parameters]

    def gradient(self) -> tuple[Tensor, float, int]:
        """The hypergradient in the unit cube, shape (d,), the solve's relative residual, and its products."""
        right = list(self.levels.gradient("upper", {}, self.weights).gradient)
        solution, residual, products = self.solve(right)
        mixed = self.product(solution, self.searched)
        self.objective.charge(self.levels.passes)
        parameters = self.objective.space.parameters
        slopes = [p.slope(self.objective.space.value(self.config, p)) for p in parameters]
        entries = [-entry.item() * slope for entry, slope in zip(mixed, slopes, strict=True)]
        return torch.tensor(entries, dtype=torch.double), residual, products

    def solve(self, right: Tensors) -> tuple[Tensors, float, int]:
        """Conjugate gradients (Hestenes & Stiefel 1952)."""
        solution = [torch.zeros_like(r) for r in right]
        residual = [r.clone() for r in right]
        direction = [r.clone() for r in right]
        start = squared = inner(residual, residual)
        products = 0
        while products < self.max_products and squared > self.tolerance**2 * start:
            image = self.product(direction, self.weights)
            products += 1
            curvature = inner(direction, image)
            if not curvature > 1e-12 * inner(direction, direction):
                if products == 1:
                    solution = right
                break
            length = squared / curvature
            solution = [s + length * d for s, d in zip(solution, direction, strict=True)]
            residual = [r - length * i for r, i in zip(residual, image, strict=True)]
            previous, squared = squared, inner(residual, residual)
            direction = [r + squared / previous * d for r, d in zip(residual, direction, strict=True)]
        return solution, (squared / start) ** 0.5 if start else 0.0, products

    def product(self, vector: Sequence[Tensor], wrt: Sequence[Tensor]) -> Tensors:
        """d/d(wrt) <df/dy, vector> over all lower-level batches, in eval mode."""
        level: Level = "lower"
        problem, levels = self.levels.problem, self.levels
        levels.model.eval()
        sums, count = [torch.zeros_like(w) for w in wrt], 0
        for raw in problem.batches(level, None):
            batch, size = levels.on_device(raw), problem.batch_size(raw)
            loss = levels.batch_loss(level, self.hyperparameters, batch)
            first = torch.autograd.grad(loss, self.weights, create_graph=True, allow_unused=True)
            along = sum(((g * v).sum() for g, v in zip(first, vector, strict=True) if g is not None), torch.zeros(()))
            for entry, gradient in zip(sums, torch.autograd.grad(along, wrt, allow_unused=True), strict=True):
                if gradient is not None:
                    entry.add_(gradient, alpha=size)
            levels.examples += size
            count += size
        return [entry / count for entry in sums]


def inner(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return sum((p.double() * q.double()).sum().item() for p, q in zip(a, b, strict=True))


def lbfgsb_centre(objective: Objective, seed: int, tolerance: float = 1e-3, max_solve: float = 1.0) -> None:
    """From the centre of the box; after it has converged, from random points."""
    _lbfgsb(objective, seed, True, tolerance, max_solve)


def lbfgsb_random(objective: Objective, seed: int, tolerance: float = 1e-3, max_solve: float = 1.0) -> None:
    """From random points, one after another."""
    _lbfgsb(objective, seed, False, tolerance, max_solve)


def _lbfgsb(objective: Objective, seed: int, centre: bool, tolerance: float, max_solve: float) -> None:
    dimension = objective.space.dimension
    starts = iter(sobol_points(dimension, 4096, seed))
    for number in itertools.count():
        start = torch.full((dimension,), 0.5, dtype=torch.double) if centre and number == 0 else next(starts)

        def both(point: Any, number: int = number) -> tuple[float, Any]:
            unit = torch.from_numpy(point).clamp(0, 1)
            trained, checkpoint = objective.train(unit, {"start": number})
            if trained is None:
                return objective.worst(), 0 * point
            if objective.cost >= objective.budget:
                raise BudgetSpent
            implicit = ImplicitGradient(objective, unit, checkpoint, tolerance, max_solve)
            gradient, residual, products = implicit.gradient()
            objective.note(hypergradient=gradient.tolist(), residual=residual, products=products)
            return trained.upper_loss, gradient.numpy()

        options = {"maxiter": 10_000, "maxfun": 100_000, "ftol": 1e-7, "gtol": 1e-6}
        minimize(both, start.numpy(), jac=True, method="L-BFGS-B", bounds=[(0.0, 1.0)] * dimension, options=options)
