"""Hypergradients of upper levels too large to model: implicit, unrolled, by a penalty."""

from raybilevel._linear.krylov import (
    ConjugateGradients,
    LinearSolution,
    LinearSolver,
    LinearSystem,
    MinimalResidual,
    NeumannSeries,
)
from raybilevel._linear.recycling import RecycleSpace, Selection
from raybilevel._lower.functions import BilevelFunctions
from raybilevel._lower.hypergradient import Hypergradient
from raybilevel._lower.linearisation import Linearisation
from raybilevel.hypergradient._descent import CHECKPOINT_FILE, BilevelDescent, dump_checkpoint, load_checkpoint
from raybilevel.hypergradient._estimators import (
    DynamicBarrier,
    Equilibrium,
    Estimator,
    FirstOrder,
    Implicit,
    Unrolled,
)
from raybilevel.hypergradient._fixed_point import AndersonAcceleration, FixedPoint
from raybilevel.hypergradient._lower import LowerSolution, solve_lower
from raybilevel.hypergradient._settings import DescentSettings, check_smooth

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
    "check_smooth",
    "dump_checkpoint",
    "load_checkpoint",
    "solve_lower",
]
