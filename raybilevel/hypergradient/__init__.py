"""Hypergradients of upper levels too large to model: implicit, unrolled, by a penalty."""

from raybilevel.hypergradient._descent import CHECKPOINT_FILE, BilevelDescent, dump_checkpoint, load_checkpoint
from raybilevel.hypergradient._estimators import (
    DynamicBarrier,
    Equilibrium,
    Estimator,
    FirstOrder,
    Hypergradient,
    Implicit,
    Unrolled,
)
from raybilevel.hypergradient._fixed_point import AndersonAcceleration, FixedPoint
from raybilevel.hypergradient._functions import BilevelFunctions, Linearisation
from raybilevel.hypergradient._krylov import (
    ConjugateGradients,
    LinearSolution,
    LinearSolver,
    LinearSystem,
    MinimalResidual,
    NeumannSeries,
)
from raybilevel.hypergradient._lower import LowerSolution, solve_lower
from raybilevel.hypergradient._recycling import RecycleSpace, Selection
from raybilevel.hypergradient._settings import DescentSettings

__all__ = [
    "CHECKPOINT_FILE",
    "AndersonAcceleration",
    "BilevelDescent",
    "BilevelFunctions",
    "ConjugateGradients",
    "DescentSettings",
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
    "dump_checkpoint",
    "load_checkpoint",
    "solve_lower",
]
