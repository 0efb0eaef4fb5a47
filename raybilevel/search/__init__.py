"""A search as ask/tell over plain values, and a loop that drives it in one process. No Ray."""

from raybilevel.search._checks import check_problem
from raybilevel.search._local import observe, search
from raybilevel.search._optimizer import BilevelOptimizer, Observation

__all__ = ["BilevelOptimizer", "Observation", "check_problem", "observe", "search"]
