"""The settings of a bilevel descent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from raybilevel._linear.krylov import ConjugateGradients, LinearSolver, MinimalResidual, NeumannSeries
from raybilevel._linear.recycling import Selection
from raybilevel.errors import ConfigError, ProblemError
from raybilevel.hypergradient._estimators import (
    DynamicBarrier,
    Equilibrium,
    Estimator,
    FirstOrder,
    Implicit,
    Unrolled,
)
from raybilevel.problem import BilevelProblem, SupportsShards
from raybilevel.space import Space

ESTIMATORS: dict[str, type[Unrolled] | type[FirstOrder] | type[DynamicBarrier] | type[Equilibrium]] = {
    "equilibrium": Equilibrium,
    "unrolled": Unrolled,
    "first_order": FirstOrder,
    "dynamic_barrier": DynamicBarrier,
}
SOLVERS: dict[str, type[ConjugateGradients] | type[NeumannSeries] | type[MinimalResidual]] = {
    "cg": ConjugateGradients,
    "neumann": NeumannSeries,
    "minres": MinimalResidual,
}


@dataclass(frozen=True)
class DescentSettings:
    """Adam (Kingma & Ba 2015) on hypergradients, the lower level going on from where it was.

    Inexact by design: the lower level is solved to `lower_tolerance`, or trained on for `lower_epochs`; the linear
    solve may end when the estimated error of the hypergradient is below `accuracy` times the norm of the last one. At
    the end the lower level is trained anew, cold, at the x with the lowest F, or the lowest selection loss where the
    problem has one, and F there is the trial's result.

    steps, rate:     of Adam, on x; the rate falls to a tenth of itself along a cosine.
    estimator:       "implicit", "unrolled", "first_order" (F2SA), "dynamic_barrier" (BOME), or, of a fixed point,
        "equilibrium"; `estimator_settings` are those of its class in `raybilevel.hypergradient`.
    solver:          of "implicit": "minres", "cg" or "neumann", with `solver_settings`; those of "minres" may name a
        `selection` to recycle by: "auto", null for nothing, or for example {strategy: ritz_generalized_singular,
        end: largest, dimension: 20}.
    lower:           "tolerance": L-BFGS on all lower data to |df/dy| <= lower_tolerance, or 1000 iterations;
        "optimizer": the problem's optimizer, its `epochs` at first and `lower_epochs` after each step; "fixed_point":
        of the problem's `lower_map`, by Anderson acceleration to |g(y) - y| <= lower_tolerance |g(y)|, or 100
        evaluations.
    shards:          parts of the data; start s descends on part s mod `shards` from the start s // shards, and its
        result is taken at weights trained anew on all data. For problems with `upper_variables` that have a `shard`.
    """

    steps: int = 50
    rate: float = 0.05
    estimator: Literal["implicit", "unrolled", "first_order", "dynamic_barrier", "equilibrium"] = "implicit"
    estimator_settings: Mapping[str, Any] = field(default_factory=dict)
    solver: Literal["minres", "cg", "neumann"] = "minres"
    solver_settings: Mapping[str, Any] = field(default_factory=dict)
    lower: Literal["tolerance", "optimizer", "fixed_point"] = "optimizer"
    lower_tolerance: float = 1e-5
    lower_epochs: int = 1
    accuracy: float = 0.1
    shards: int = 1

    def __post_init__(self) -> None:
        positive = min(self.rate, self.lower_tolerance, self.accuracy) > 0
        if min(self.steps, self.lower_epochs, self.shards) < 1 or not positive:
            raise ConfigError(
                "steps, lower_epochs and shards must be at least 1; rate, lower_tolerance and accuracy positive"
            )
        if self.lower not in ("tolerance", "optimizer", "fixed_point"):
            raise ConfigError(f"lower must be 'tolerance', 'optimizer' or 'fixed_point', got {self.lower!r}")
        if self.estimator == "equilibrium" and self.lower != "fixed_point":
            raise ConfigError("estimator 'equilibrium' needs lower 'fixed_point'")
        # For its errors: settings are refused before anything runs.
        self.make_estimator()

    def make_estimator(self) -> Estimator:
        """The estimator that the settings name.

        Raises:
            ConfigError: there is none of this name, or it has no such setting.
        """
        if self.estimator == "implicit":
            return Implicit(self._solver(), **self._checked(Implicit, "estimator_settings", self.estimator_settings))
        if self.estimator not in ESTIMATORS:
            raise ConfigError(f"unknown estimator {self.estimator!r}; choose one of implicit, {', '.join(ESTIMATORS)}")
        chosen = ESTIMATORS[self.estimator]
        return chosen(**self._checked(chosen, "estimator_settings", self.estimator_settings))

    def _solver(self) -> LinearSolver:
        if self.solver not in SOLVERS:
            raise ConfigError(f"unknown solver {self.solver!r}; choose one of {', '.join(SOLVERS)}")
        chosen = SOLVERS[self.solver]
        given = self._checked(chosen, "solver_settings", self.solver_settings)
        if isinstance(given.get("selection"), Mapping):
            given["selection"] = Selection(**self._checked(Selection, "selection", given["selection"]))
        return chosen(**given)

    @staticmethod
    def _checked(chosen: type[Any], name: str, given: Mapping[str, Any]) -> dict[str, Any]:
        known = chosen.__dataclass_fields__
        for setting in given:
            if setting not in known:
                raise ConfigError(f"{name}: {chosen.__name__} has no setting {setting!r}; it has {', '.join(known)}")
        return dict(given)

    def check(self, problem: BilevelProblem, space: Space) -> None:
        """Refuse shards that a problem does not have.

        Raises:
            ProblemError: x is a point of a box, whose descents have no number, or the problem cannot be divided at all.
            ConfigError: it cannot be divided into so many.
        """
        if not space.of_starts:
            check_smooth(type(self).__name__, space)
        if self.shards == 1:
            return
        if not space.of_starts:
            raise ProblemError(f"shards={self.shards} is for upper_variables(); a search space's descents see all data")
        if not isinstance(problem, SupportsShards):
            raise ProblemError(f"{type(problem).__name__} has no shard(index, count), which shards={self.shards} needs")
        # The last part: a problem with fewer refuses it.
        problem.shard(self.shards - 1, self.shards)


def check_smooth(method: str, space: Space) -> None:
    """What a method refuses that follows gradients in every hyperparameter.

    Raises:
        ConfigError: there are hyperparameters without one.
    """
    names = [p.name for p, smooth in zip(space.parameters, space.smooth, strict=True) if not smooth]
    if names:
        raise ConfigError(
            f"{method} follows gradients in every hyperparameter, and the lower-level loss has none in "
            f"{', '.join(names)}; use method='default', which searches them by values, or make them constants"
        )
