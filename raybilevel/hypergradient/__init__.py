"""Hypergradients of upper levels too large to model: implicit, unrolled, by a penalty."""

from raybilevel.hypergradient.estimators import (
    DynamicBarrier,
    Equilibrium,
    Estimator,
    FirstOrder,
    Hypergradient,
    Implicit,
    Unrolled,
)
from raybilevel.hypergradient.fixed_point import AndersonAcceleration, FixedPoint
from raybilevel.hypergradient.functions import BilevelFunctions, Linearisation
from raybilevel.hypergradient.krylov import (
    ConjugateGradients,
    LinearSolution,
    LinearSolver,
    LinearSystem,
    MinimalResidual,
    NeumannSeries,
)
from raybilevel.hypergradient.lower import LowerSolution, solve_lower
from raybilevel.hypergradient.recycling import RecycleSpace, Selection

__all__ = [
    "AndersonAcceleration",
    "BilevelFunctions",
    "ConjugateGradients",
    "DynamicBarrier",
    "Equilibrium",
    "Estimator",
    "FirstOrder",
    "FixedPoint",
    "Hypergradient",
    "Implicit",
    "LinearSolution",
    "LinearSolver",
    "LinearSystem",
    "Linearisation",
    "LowerSolution",
    "MinimalResidual",
    "NeumannSeries",
    "RecycleSpace",
    "Selection",
    "Unrolled",
    "solve_lower",
]
