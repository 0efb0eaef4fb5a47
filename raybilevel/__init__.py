"""Bilevel hyperparameter optimization on Ray clusters."""

from raybilevel.hypergradient_trainable import hypergradient_trainable
from raybilevel.problem import BilevelProblem
from raybilevel.searcher import BilevelSearch
from raybilevel.trainable import lower_level_trainable
from raybilevel.version import __version__

__all__ = ["BilevelProblem", "BilevelSearch", "__version__", "hypergradient_trainable", "lower_level_trainable"]
