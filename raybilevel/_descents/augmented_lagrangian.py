"""Augmented Lagrangians of the single-level problem  min F(x, y)  subject to  c(x, y) = f(x, y) - v(x) - eps <= 0.

Two methods of multipliers, each a frozen dataclass of settings with a `merit` and an `update`; the state is a value.
"""

from __future__ import annotations

from dataclasses import dataclass

from raybilevel.errors import ConfigError


@dataclass(frozen=True)
class MultiplierState:
    """Where a method of multipliers stands.

    multiplier: units of F per unit of f; nonnegative for the one-sided method.
    penalty:    positive; units of F per unit of f squared.
    violation:  |max(0, c)| (one-sided) or |c| (equality) after the last update; infinite before the first.
    """

    multiplier: float
    penalty: float
    violation: float = float("inf")


@dataclass(frozen=True)
class OneSided:
    """Method of multipliers for c <= 0.

        L = F + (max(0, multiplier + penalty c)^2 - multiplier^2) / (2 penalty)

    Bertsekas (1982), Constrained Optimization and Lagrange Multiplier Methods, ch. 3. The multiplier becomes
    max(0, multiplier + penalty c); the penalty grows where the violation did not fall enough (Birgin & Martinez 2014,
    Algorithm 4.1, on plain violations).
    """

    growth: float = 4.0
    sufficient_decrease: float = 0.5

    def __post_init__(self) -> None:
        if not self.growth > 1:
            raise ConfigError(f"growth must exceed 1 so that the penalty can rise, got {self.growth}")
        if not 0 < self.sufficient_decrease < 1:
            raise ConfigError(f"sufficient_decrease must lie between 0 and 1, got {self.sufficient_decrease}")

    def merit(self, state: MultiplierState, upper: float, constraint: float) -> float:
        shifted = self.force(state, constraint)
        return upper + (shifted**2 - state.multiplier**2) / (2 * state.penalty)

    def force(self, state: MultiplierState, constraint: float) -> float:
        """dL/dc: what multiplies the gradient of the constraint in the gradient of L."""
        return max(0.0, state.multiplier + state.penalty * constraint)

    def update(self, state: MultiplierState, constraint: float) -> MultiplierState:
        violation = max(0.0, constraint)
        # The violation is infinite before the first update, so the penalty never grows at once.
        stalled = violation > self.sufficient_decrease * state.violation
        return MultiplierState(
            self.force(state, constraint), state.penalty * (self.growth if stalled else 1.0), violation
        )


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
