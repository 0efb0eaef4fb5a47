"""The augmented Lagrangian of the single-level problem  min F(x, y)  subject to  c(x, y) = f(x, y) - v(x) = 0."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MultiplierState:
    """Where the method of multipliers stands.

    multiplier: units of F per unit of f.
    penalty:    positive; units of F per unit of f squared.
    violation:  |c| after the last update; infinite before the first.
    """

    multiplier: float
    penalty: float
    violation: float = float("inf")


@dataclass(frozen=True)
class Equality:
    """The published scheme (arXiv:2208.12118): c = f - v taken as an equality.

    L = F + (penalty / 2) c^2 + multiplier c;   multiplier <- multiplier + penalty c;   penalty <- growth * penalty
    """

    growth: float = 1.5

    def merit(self, state: MultiplierState, upper: float, constraint: float) -> float:
        return upper + state.penalty / 2 * constraint**2 + state.multiplier * constraint

    def force(self, state: MultiplierState, constraint: float) -> float:
        """dL/dc: what multiplies the gradient of the constraint in the gradient of L."""
        return state.multiplier + state.penalty * constraint

    def update(self, state: MultiplierState, constraint: float) -> MultiplierState:
        return MultiplierState(self.force(state, constraint), self.growth * state.penalty, abs(constraint))
