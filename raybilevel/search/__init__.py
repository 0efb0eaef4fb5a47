"""A search as ask/tell over plain values, and a loop that drives it in one process. No Ray."""

from raybilevel._models.for_refit import ForRefit, config_for_refit
from raybilevel.search._checks import check_problem
from raybilevel.search._local import observe, search
from raybilevel.search._new_data import NewData, new_data
from raybilevel.search._optimizer import BilevelOptimizer, Observation

__all__ = [
    "BilevelOptimizer",
    "ForRefit",
    "NewData",
    "Observation",
    "check_problem",
    "config_for_refit",
    "new_data",
    "observe",
    "search",
]
