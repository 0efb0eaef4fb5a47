"""Descents on the augmented Lagrangian from trained weights: hypergradients at fixed x, and steps in (x, y) jointly."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from raybilevel._descents.augmented_lagrangian import MultiplierState, OneSided
from raybilevel._lower.lbfgs import Merit, Tensors, curvature, inner, minimise, norm
from raybilevel._lower.levels import Levels
from raybilevel._models.value_function import ValueFunction
from raybilevel.space import Space, flatten, nest


@dataclass(frozen=True)
class Evaluation:
    """Both levels at (x, y).

    upper, upper_gradient: F and dF/dy.
    lower, lower_gradient: f, tilted (see `TrainedPoint`), and its gradient in y.
    unit_gradient:         df/dx, shape (d,), in the unit cube.
    """

    upper: float
    upper_gradient: Tensors
    lower: float
    lower_gradient: Tensors
    unit_gradient: Tensor


class TrainedPoint:
    """Both levels around one trained point (x_i, y_i), as functions of x and of the displacement y - y_i.

    A training need not have reached a stationary point (SGD, few epochs). So f is tilted by its gradient there,

        f(x, y) - <df/dy(x_i, y_i), y - y_i>,

    which y_i minimises to first order: a descent then answers to the change of x and to F, and does not go on with
    the unfinished training.
    """

    def __init__(self, levels: Levels, space: Space, constants: Mapping[str, Any], unit: Tensor) -> None:
        self.levels, self.space, self.constants, self.unit = levels, space, flatten(constants), unit
        self.weights = [w for w in levels.model.parameters() if w.requires_grad]
        self.trained = [w.detach().clone() for w in self.weights]
        self.tilt: Tensors = [torch.zeros_like(w) for w in self.weights]
        here = self.evaluate(unit, self.tilt)
        self.tilt = here.lower_gradient
        self.here = here

    def evaluate(self, unit: Tensor, displacement: Sequence[Tensor]) -> Evaluation:
        """F and tilted f at the point of the unit cube and the displacement, with gradients."""
        lower, lower_gradient, unit_gradient = self.lower(unit, displacement)
        upper = self.levels.gradient("upper", {}, self.weights)
        return Evaluation(upper.value, list(upper.gradient), lower, lower_gradient, unit_gradient)

    def lower(self, unit: Tensor, displacement: Sequence[Tensor]) -> tuple[float, Tensors, Tensor]:
        """Tilted f, its gradient in y and df/dx in the unit cube."""
        with torch.no_grad():
            for weight, start, move in zip(self.weights, self.trained, displacement, strict=True):
                weight.copy_(start + move)
        point = unit.detach().requires_grad_(True)
        decoded = flatten(self.space.decode(point))
        problem = self.levels.problem
        searched = {
            path: value.detach().to(problem.device, problem.dtype).requires_grad_(True)
            for path, value in decoded.items()
        }
        lower = self.levels.gradient("lower", nest({**self.constants, **searched}), [*self.weights, *searched.values()])
        count = len(self.weights)
        in_values = [g.to("cpu", torch.double) for g in lower.gradient[count:]]
        (unit_gradient,) = torch.autograd.grad(list(decoded.values()), point, in_values)
        tilted = lower.value - inner(self.tilt, displacement)
        return tilted, [g - t for g, t in zip(lower.gradient, self.tilt, strict=False)], unit_gradient

    @cached_property
    def difference(self) -> float:
        """How far apart in y two points are whose gradients are subtracted."""
        return math.sqrt(torch.finfo(self.trained[0].dtype).eps) * (norm(self.trained) or 1.0)

    @cached_property
    def evaluation_passes(self) -> float:
        """What one evaluation costs, in gradient evaluations of f."""
        return self.levels.evaluation_passes()


@dataclass(frozen=True)
class Hypergradient:
    """dF(x, y*(x))/dx from the augmented Lagrangian at fixed x.

    gradient:     shape (d,), in the unit cube.
    multiplier:   m, at which F falls by `decrease`.
    decrease:     how far F at y_m lies below F at the trained weights, relative to |F| there.
    slack:        f(x, y_m) - v(x) >= 0: y_m minimises F where f <= v + slack.
    displacement: y_m - y_i.
    first:        of a descent, its multiplier relative to the Cauchy estimate, a good start for the next; None where
                  f is convex at y_i, and the limit of large m was taken.
    """

    gradient: Tensor
    multiplier: float
    decrease: float
    slack: float
    displacement: Tensors
    first: float | None = None


def hypergradient(
    point: TrainedPoint, decrease: float, max_passes: float, first: float = 10.0, tolerance: float = 0.02
) -> Hypergradient:
    """The hypergradient at a trained point, from gradients of f and F alone.

    At the minimiser y_m of F + m f the envelope theorem gives d/dx (F + m (f - v)) = m (df/dx(x, y_m) - dv/dx), which
    tends to the hypergradient, with an error of order 1/m. Where f is convex about y_i the limit of large m is a linear
    system, solved to the relative residual `tolerance` (`limit_direction`); where it is not, F + m f is descended at
    a finite m (`descend`). Either may take `max_passes`.
    """
    direction = limit_direction(point, max_passes, tolerance)
    if direction is None:
        return descend(point, decrease, max_passes, first, tolerance)
    # A central difference: where f holds a square of y, as in weight decay, a one-sided one is off by that square.
    length = point.difference / norm(direction)
    forward, backward = ([sign * length * u for u in direction] for sign in (1, -1))
    mixed = (point.lower(point.unit, forward)[2] - point.lower(point.unit, backward)[2]) / (2 * length)
    fall = -inner(point.here.upper_gradient, direction)  # of F, linearised, along y_m - y_i = direction / m, times m
    multiplier = fall / (decrease * (abs(point.here.upper) or 1.0))
    return Hypergradient(mixed, multiplier, decrease, fall / (2 * multiplier**2), [u / multiplier for u in direction])


FLAT = 1e-4


def limit_direction(point: TrainedPoint, max_passes: float, tolerance: float) -> Tensors | None:
    """u = lim m (y_m - y_i) for m to infinity, H u = -dF/dy with H = d2f/dy2; None where f is not convex along the way,
    or F does not depend on y.

    By conjugate residuals (Stiefel 1955), whose residual falls monotonically, so that they may be cut short; each
    product with H is a difference of two gradients of f. Along directions in which f is flat (many minimisers) a
    training does not answer to x: there the iteration ends, and u is the least-squares solution.
    """
    begun = point.levels.passes

    def product(vector: Tensors) -> Tensors:
        length = point.difference / norm(vector)
        return [g / length for g in point.lower(point.unit, [length * v for v in vector])[1]]

    residual = [-g for g in point.here.upper_gradient]
    start = size = inner(residual, residual)
    if start == 0:
        return None
    solution: Tensors = [torch.zeros_like(r) for r in residual]
    image = product(residual)
    energy, largest = inner(residual, image), 0.0
    direction, direction_image = residual, image
    while True:
        largest = max(largest, abs(energy) / size)
        if energy <= FLAT * largest * size:
            return None if energy < -FLAT * largest * size or size == start else solution
        length = energy / inner(direction_image, direction_image)
        solution = [s + length * d for s, d in zip(solution, direction, strict=True)]
        residual = [r - length * h for r, h in zip(residual, direction_image, strict=True)]
        size = inner(residual, residual)
        # two more passes are for the difference in x
        if size <= tolerance**2 * start or point.levels.passes - begun + 3 > max_passes:
            return solution
        image, previous = product(residual), energy
        energy = inner(residual, image)
        direction = [r + energy / previous * d for r, d in zip(residual, direction, strict=True)]
        direction_image = [h + energy / previous * d for h, d in zip(image, direction_image, strict=True)]


def descend(
    point: TrainedPoint, decrease: float, max_passes: float, first: float = 10.0, tolerance: float = 0.02
) -> Hypergradient:
    """Minimise F + m f over y at fixed x by L-BFGS; raise m until F falls by about `decrease` |F| only.

    `first` times the multiplier at which a Cauchy step would lower F by `decrease` |F| is tried first: nothing here
    depends on the units of F, f, x or y.
    """
    begun = point.levels.passes
    here = point.here
    scale = abs(here.upper) or 1.0
    squared = inner(here.upper_gradient, here.upper_gradient)
    if squared == 0:  # F does not depend on y
        return Hypergradient(torch.zeros_like(point.unit), 0.0, 0.0, 0.0, [torch.zeros_like(w) for w in point.trained])
    bent = _curvature(point)
    cauchy = squared / (bent * decrease * scale)
    multiplier = first * cauchy
    move: Tensors = [torch.zeros_like(w) for w in point.trained]
    while True:
        # In units of the Cauchy step and its decrease, value, gradient and variables of the descent are of order one.
        step, gain = math.sqrt(squared) / (multiplier * bent), squared / (multiplier * bent)
        evaluations = int((max_passes - (point.levels.passes - begun)) / point.evaluation_passes)

        def merit(scaled: Tensors, multiplier: float = multiplier, step: float = step, gain: float = gain) -> Merit:
            at = point.evaluate(point.unit, [step * s for s in scaled])
            value = (at.upper - here.upper + multiplier * (at.lower - here.lower)) / gain
            both = zip(at.upper_gradient, at.lower_gradient, strict=True)
            return value, [(a + multiplier * b) * (step / gain) for a, b in both]

        reference = max(g.abs().max().item() for g in here.upper_gradient) * step / gain
        scaled = minimise(merit, [m / step for m in move], max(3, evaluations), tolerance * reference)
        move = [step * s for s in scaled]
        at = point.evaluate(point.unit, move)
        fallen = (here.upper - at.upper) / scale
        if fallen <= 1.5 * decrease or point.levels.passes - begun + 4 * point.evaluation_passes >= max_passes:
            break
        raised = multiplier * max(2.0, fallen / decrease)
        move = [m * (multiplier / raised) for m in move]
        multiplier = raised
    return Hypergradient(
        multiplier * (at.unit_gradient - here.unit_gradient),
        multiplier,
        fallen,
        at.lower - here.lower,
        move,
        multiplier / cauchy,
    )


def _curvature(point: TrainedPoint) -> float:
    """<g, H g> / <g, g> of f along g = dF/dy at the trained weights, by one difference of gradients."""
    here, still = point.here, [torch.zeros_like(w) for w in point.trained]  # tilted f has gradient 0 there
    along, length = here.upper_gradient, point.difference
    return max(1e-12, curvature(lambda move: point.lower(point.unit, move)[:2], still, still, along, length))


@dataclass(frozen=True)
class JointDescent:
    """Where an augmented Lagrangian descent in (x, y) ended; `unit` is x, shape (d,)."""

    unit: Tensor
    multipliers: MultiplierState


def joint_descent(
    point: TrainedPoint,
    start: Hypergradient,
    value_function: ValueFunction,
    radius: float,
    max_passes: float,
    rounds: int = 2,
) -> JointDescent:
    """Minimise F over x and y subject to f(x, y) <= v_hat(x) + slack, within `radius` of x_i.

    It begins at (x_i, y_m) with the multiplier and the slack of the descent at fixed x, where these already solve the
    problem in y: no multiplier has to be guessed. v_hat is shifted to be exact at x_i.
    """
    if start.multiplier == 0:  # F does not depend on y: there is nothing to weigh
        return JointDescent(point.unit, MultiplierState(0.0, 1.0, 0.0))
    method = OneSided()
    low, high = (point.unit - radius).clamp(0, 1), (point.unit + radius).clamp(0, 1)
    middle, half = (low + high) / 2, (high - low) / 2
    shift = value_function.mean(point.unit).item() - point.here.lower
    slack = max(start.slack, 1e-12 * max(1.0, abs(point.here.lower)))
    state = MultiplierState(start.multiplier, start.multiplier / slack)
    size = math.sqrt(inner(start.displacement, start.displacement)) or 1.0
    gain = max(start.decrease, 1e-6) * (abs(point.here.upper) or 1.0)
    # x = middle + half sin(angle) stays in the box; y = y_i + size * scaled keeps all variables of order one.
    inside = ((point.unit - middle) / half).clamp(-0.95, 0.95)
    variables = [torch.asin(inside), *(move / size for move in start.displacement)]

    def at(variables: Tensors) -> tuple[Tensor, Tensor, Evaluation, float, Tensor]:
        angle = variables[0].double()
        unit = middle + half * torch.sin(angle)
        evaluation = point.evaluate(unit, [size * v for v in variables[1:]])
        tracked = unit.clone().requires_grad_(True)
        value = value_function.mean(tracked)
        (slope,) = torch.autograd.grad(value, tracked)
        constraint = evaluation.lower - (value.item() - shift) - slack
        return unit, half * torch.cos(angle), evaluation, constraint, slope

    budget = point.levels.passes + max_passes
    for remaining in range(rounds, 0, -1):
        current = state

        def merit(variables: Tensors, current: MultiplierState = current) -> Merit:
            _, stretch, evaluation, constraint, slope = at(variables)
            force = method.force(current, constraint)
            in_x = force * (evaluation.unit_gradient - slope) * stretch
            both = zip(evaluation.upper_gradient, evaluation.lower_gradient, strict=True)
            in_y = [(a + force * b) * size for a, b in both]
            return method.merit(current, evaluation.upper, constraint) / gain, [g / gain for g in [in_x, *in_y]]

        evaluations = int((budget - point.levels.passes) / point.evaluation_passes / remaining)
        if evaluations < 2:
            break
        variables = minimise(merit, variables, evaluations, 1e-2)
        state = method.update(state, at(variables)[3])
    return JointDescent(at(variables)[0].detach(), state)
