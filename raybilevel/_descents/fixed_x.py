"""Hypergradients at fixed x from gradients alone: a linear system, or a descent on F + m f."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from raybilevel._descents.trained_point import TrainedPoint
from raybilevel._linear.krylov import LinearSystem, MinimalResidual
from raybilevel._lower.hypergradient import Hypergradient, checked, implicit
from raybilevel._lower.lbfgs import curvature, minimise
from raybilevel._lower.linearisation import inner
from raybilevel.errors import RaybilevelError

FLAT = 1e-4
ROUNDINGS = 100
"""Of F and f, sums over many examples, in units of their precision."""


class RejectedDescentError(RaybilevelError, ArithmeticError):
    """A descent did not end where the envelope theorem holds."""


@dataclass(frozen=True)
class LagrangianPoint:
    """Where the Lagrangian F + m f is least in y at fixed x, and the hypergradient that it gives.

    hypergradient: in the unit cube.
    multiplier:    m, at which F falls by `decrease`.
    decrease:      how far F at y_m lies below F at the trained weights, relative to |F| there.
    slack:         f(x, y_m) - v(x) >= 0: y_m minimises F where f <= v + slack.
    displacement:  y_m - y_i, shape (n,).
    first:         of a descent, its multiplier relative to the Cauchy estimate, a good start for the next; None where
                   f is convex at y_i, and the limit of large m was taken.
    """

    hypergradient: Hypergradient
    multiplier: float
    decrease: float
    slack: float
    displacement: Tensor
    first: float | None = None

    @property
    def gradient(self) -> Tensor:
        """Of the hypergradient, shape (d,)."""
        return self.hypergradient.gradient


def lagrangian_point(
    point: TrainedPoint, decrease: float, max_passes: float, first: float = 10.0, tolerance: float = 0.02
) -> LagrangianPoint:
    """The hypergradient at a trained point, from gradients of f and F alone.

    At the minimiser y_m of F + m f the envelope theorem gives d/dx (F + m (f - v)) = dF/dx + m (df/dx(x, y_m) - dv/dx),
    which tends to the hypergradient, with an error of order 1/m. Where f is convex about y_i the limit of large m is a
    linear system, solved to the relative residual `tolerance` (`limit`); where it is not, F + m f is descended at
    a finite m (`descend`). Either may take `max_passes`.
    """
    return limit(point, decrease, max_passes, tolerance) or descend(point, decrease, max_passes, first, tolerance)


def limit(point: TrainedPoint, decrease: float, max_passes: float, tolerance: float) -> LagrangianPoint | None:
    """The limit of large m: m (y_m - y_i) -> -q with H q = dF/dy and H = d2f/dy2; None where f is not convex along the
    way, or F does not depend on y.

    By MINRES, whose residual falls monotonically, so that it may be cut short; each product with H is a difference of
    two gradients of f. Along directions in which f is flat (many minimisers) a training does not answer to x: there the
    iteration ends, and q is the least-squares solution. Multiplier, decrease and slack are those of the m at which F,
    linearised, falls by `decrease`.
    """
    upper, products = point.here.upper, point.products
    # two more passes are for the difference in x
    solver = MinimalResidual(tolerance, limit=max(1, math.floor(max_passes) - 2), flat=FLAT)
    solved, _ = solver.solve(LinearSystem(products.hessian, upper.in_y, products.mixed), None)
    if solved.negative or not solved.solution.any():
        return None
    fall = inner(upper.in_y, solved.solution)  # of F, linearised, along y_m - y_i = -q / m, times m
    # F falls by fall / m in all. Choose m so that this is `decrease` |F|.
    multiplier = fall / (decrease * (abs(upper.value) or 1.0))
    found = implicit(upper, products, solved)
    # slack: f rises by <q, H q> / (2 m^2), and H q = dF/dy.
    return LagrangianPoint(found, multiplier, decrease, fall / (2 * multiplier**2), -solved.solution / multiplier)


def descend(
    point: TrainedPoint, decrease: float, max_passes: float, first: float = 10.0, tolerance: float = 0.02
) -> LagrangianPoint:
    """Minimise F + m f over y at fixed x by L-BFGS; raise m until F falls by about `decrease` |F| only.

    `first` times the multiplier at which a Cauchy step would lower F by `decrease` |F| is tried first: nothing here
    depends on the units of F, f, x or y.

    Raises:
        NotFiniteError: F, f or the hypergradient is NaN or infinite.
        RejectedDescentError: F rose, or f fell below the training's, where f is tilted to be least at its weights.
    """
    begun = point.levels.passes
    here = point.here
    scale = abs(here.upper.value) or 1.0
    squared = inner(here.upper.in_y, here.upper.in_y)
    if squared == 0:  # F does not depend on y
        found = Hypergradient(here.upper.in_x, here.upper.value)
        return LagrangianPoint(found, 0.0, 0.0, 0.0, point.still)
    bent = _curvature(point)
    cauchy = squared / (bent * decrease * scale)
    multiplier = first * cauchy
    move = point.still
    while True:
        # In units of the Cauchy step and its decrease, value, gradient and variables of the descent are of order one.
        # torch's L-BFGS leaves out an update with <y, s> below 1e-10, in whatever units these are.
        step, gain = math.sqrt(squared) / (multiplier * bent), squared / (multiplier * bent)
        evaluations = int((max_passes - (point.levels.passes - begun)) / point.evaluation_passes)

        def merit(
            scaled: Tensor, multiplier: float = multiplier, step: float = step, gain: float = gain
        ) -> tuple[float, Tensor]:
            at = point.evaluate(point.x, step * scaled)
            value = at.upper.value - here.upper.value + multiplier * (at.lower.value - here.lower.value)
            return value / gain, (at.upper.in_y + multiplier * at.lower.in_y) * (step / gain)

        # `tolerance` is relative to the gradient at y_i, where that of f is 0: dF/dy in the descent's units.
        reference = here.upper.in_y.abs().max().item() * step / gain
        move = step * minimise(merit, move / step, max(3, evaluations), tolerance * reference).at
        at = point.evaluate(point.x, move)
        fallen = (here.upper.value - at.upper.value) / scale
        # Another descent is not worth its start with fewer than four evaluations left.
        if fallen <= 1.5 * decrease or point.levels.passes - begun + 4 * point.evaluation_passes >= max_passes:
            break
        # Fall and displacement are of order 1/m, so the next descent starts at the displacement scaled down.
        raised = multiplier * max(2.0, fallen / decrease)
        move = move * (multiplier / raised)
        multiplier = raised
    # The envelope theorem, with dv/dx = df/dx(x, y_i) by Danskin's.
    gradient = at.upper.in_x + multiplier * (at.lower.in_x - here.lower.in_x)
    slack = at.lower.value - here.lower.value
    found = checked(Hypergradient(gradient, here.upper.value))
    rounding = ROUNDINGS * torch.finfo(point.y.dtype).eps
    if fallen < -rounding or slack < -rounding * (abs(here.lower.value) or 1.0):
        raise RejectedDescentError(
            f"a descent from trained weights raised F by {-fallen:.3g} of itself, or lowered f by {-slack:.3g} below "
            "the training's; it is no answer to the hyperparameters, and its hypergradient is left out"
        )
    return LagrangianPoint(found, multiplier, fallen, slack, move, multiplier / cauchy)


def _curvature(point: TrainedPoint) -> float:
    """<g, H g> / <g, g> of f along g = dF/dy at the trained weights, by one difference of gradients."""

    def lower(move: Tensor) -> tuple[float, Tensor]:
        found = point.lower(point.x, move)
        return found.value, found.in_y

    along = point.here.upper.in_y
    # f may be flat, or bent downwards, along dF/dy. The Cauchy step divides by this.
    return max(1e-12, curvature(lower, point.still, torch.zeros_like(along), along, point.difference))
