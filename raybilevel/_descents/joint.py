"""A descent on the augmented Lagrangian in (x, y) jointly, from where a descent at fixed x ended."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from raybilevel._descents.augmented_lagrangian import MultiplierState, OneSided
from raybilevel._descents.fixed_x import LagrangianPoint
from raybilevel._descents.trained_point import Evaluation, TrainedPoint
from raybilevel._lower.lbfgs import minimise
from raybilevel._lower.linearisation import norm
from raybilevel._models.value_function import ValueFunction


@dataclass(frozen=True)
class JointDescent:
    """Where an augmented Lagrangian descent in (x, y) ended; x and y, shapes (d,) and (n,), x in the unit cube."""

    x: Tensor
    y: Tensor
    multipliers: MultiplierState


def joint_descent(
    point: TrainedPoint,
    start: LagrangianPoint,
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
        return JointDescent(point.x, point.y, MultiplierState(0.0, 1.0, 0.0))
    method = OneSided()
    low, high = (point.x - radius).clamp(0, 1), (point.x + radius).clamp(0, 1)
    middle, half = (low + high) / 2, (high - low) / 2
    # v_hat - shift is f at (x_i, y_i), so that the constraint holds there with all of its slack.
    shift = value_function.mean(point.x).item() - point.here.lower.value
    slack = max(start.slack, 1e-12 * max(1.0, abs(point.here.lower.value)))
    # At y_m c = 0, and the force on f is m. At y_i c = -slack, and it is 0.
    state = MultiplierState(start.multiplier, start.multiplier / slack)
    size = norm(start.displacement) or 1.0
    gain = max(start.decrease, 1e-6) * (abs(point.here.upper.value) or 1.0)
    # x = middle + half sin(angle) stays in the box; y = y_i + size * scaled keeps all variables of order one.
    # At a bound the cosine is 0, and no gradient in the angle would leave it.
    inside = ((point.x - middle) / half).clamp(-0.95, 0.95)
    variables = torch.cat([torch.asin(inside).to(point.y), start.displacement / size])

    def at(variables: Tensor) -> tuple[Tensor, Tensor, Evaluation, float, Tensor]:
        angle = variables[: len(point.x)].to(point.x)
        x = middle + half * torch.sin(angle)
        evaluation = point.evaluate(x, size * variables[len(x) :])
        tracked = x.clone().requires_grad_(True)
        value = value_function.mean(tracked)
        (slope,) = torch.autograd.grad(value, tracked)
        constraint = evaluation.lower.value - (value.item() - shift) - slack
        return x, half * torch.cos(angle), evaluation, constraint, slope

    budget = point.levels.passes + max_passes
    # The method of multipliers: minimise L, then update the multiplier.
    for remaining in range(rounds, 0, -1):
        current = state

        def merit(variables: Tensor, current: MultiplierState = current) -> tuple[float, Tensor]:
            _, stretch, evaluation, constraint, slope = at(variables)
            upper, lower = evaluation
            force = method.force(current, constraint)
            in_x = (upper.in_x + force * (lower.in_x - slope)) * stretch
            in_y = (upper.in_y + force * lower.in_y) * size
            return method.merit(current, upper.value, constraint) / gain, torch.cat([in_x.to(in_y), in_y]) / gain

        # What is left is divided equally among the rounds to come.
        evaluations = int((budget - point.levels.passes) / point.evaluation_passes / remaining)
        if evaluations < 2:
            break
        variables = minimise(merit, variables, evaluations, 1e-2).at
        state = method.update(state, at(variables)[3])
    y = point.y + size * variables[len(point.x) :]
    return JointDescent(at(variables)[0].detach(), y, state)
