"""The first-order reference: L-BFGS-B on hypergradients of the implicit function theorem."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from scipy.optimize import minimize
from torch import Tensor

from benchmarks.objective import BudgetSpent, Objective
from raybilevel._linear.krylov import ConjugateGradients, LinearSystem
from raybilevel._lower.hypergradient import Hypergradient, implicit
from raybilevel._lower.levels import Levels
from raybilevel._lower.training import load_checkpoint
from raybilevel._lower.variables import BoxVariables
from raybilevel.problem import make_model
from raybilevel.space import sobol_points

TOLERANCE, MAX_SOLVE = 1e-3, 1.0


def differentiated(
    objective: Objective, unit: Tensor, trace: Mapping[str, Any], tolerance: float, max_solve: float
) -> tuple[float, Tensor]:
    """F and its implicit gradient, shape (d,), after a training; where that fails, the worst F so far and no slope.

    Raises:
        BudgetSpent: before the training, or before a solve that no training would follow.
    """
    trained, checkpoint = objective.train(unit, trace)
    if trained is None:
        return objective.worst(), torch.zeros_like(unit)
    if objective.cost >= objective.budget:
        raise BudgetSpent
    found = implicit_gradient(objective, unit, checkpoint, tolerance, max_solve)
    objective.note(hypergradient=found.gradient.tolist(), residual=found.residual, products=found.iterations)
    return trained.upper_loss, found.gradient


def implicit_gradient(
    objective: Objective, unit: Tensor, checkpoint: bytes, tolerance: float, max_solve: float
) -> Hypergradient:
    """The hypergradient at one trained point, in the unit cube, by exact products and conjugate gradients.

    The solve ends at a relative residual of `tolerance`, after `max_solve` trainings' worth of gradient evaluations, or
    where the curvature is not positive (the training stopped at no minimum); if that is at once, along dF/dy. A product
    with the Hessian counts as one gradient evaluation, in favour of this method.
    """
    problem, space = objective.problem, objective.space
    model = make_model(problem, {})
    model.load_state_dict(load_checkpoint(checkpoint)["model"])
    levels = Levels(problem, model, BoxVariables(space, {}))
    # The point that was trained: steps of hyperparameters are applied.
    x, y = space.encode(space.to_config(unit)), levels.y
    upper, products = levels.upper(x, y), levels.linearise(x, y)
    solver = ConjugateGradients(tolerance, limit=max(3, int(max_solve * objective.passes_per_training)))
    solved, _ = solver.solve(LinearSystem(products.hessian, upper.in_y, products.mixed), None)
    if not solved.solution.any():
        solved = replace(solved, solution=upper.in_y)
    found = implicit(upper, products, solved)
    objective.charge(levels.passes)
    return found


def lbfgsb_centre(objective: Objective, seed: int, tolerance: float = TOLERANCE, max_solve: float = MAX_SOLVE) -> None:
    """From the centre of the box; after it has converged, from random points."""
    _lbfgsb(objective, seed, True, tolerance, max_solve)


def lbfgsb_random(objective: Objective, seed: int, tolerance: float = TOLERANCE, max_solve: float = MAX_SOLVE) -> None:
    """From random points, one after another."""
    _lbfgsb(objective, seed, False, tolerance, max_solve)


def _lbfgsb(objective: Objective, seed: int, centre: bool, tolerance: float, max_solve: float) -> None:
    dimension = objective.space.dimension
    starts = iter(sobol_points(dimension, 4096, seed))
    for number in itertools.count():
        start = torch.full((dimension,), 0.5, dtype=torch.double) if centre and number == 0 else next(starts)

        def both(point: Any, number: int = number) -> tuple[float, Any]:
            unit = torch.from_numpy(point).clamp(0, 1)
            value, gradient = differentiated(objective, unit, {"start": number}, tolerance, max_solve)
            return value, gradient.numpy()

        options = {"maxiter": 10_000, "maxfun": 100_000, "ftol": 1e-7, "gtol": 1e-6}
        minimize(both, start.numpy(), jac=True, method="L-BFGS-B", bounds=[(0.0, 1.0)] * dimension, options=options)
