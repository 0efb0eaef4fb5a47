"""Bilevel hyperparameter optimization on Ray clusters."""

from typing import TYPE_CHECKING

from raybilevel._lazy import lazy_names
from raybilevel._version import __version__

if TYPE_CHECKING:
    from raybilevel._lower.training import refit
    from raybilevel._records.experiment import summarise
    from raybilevel.folds import CrossValidated
    from raybilevel.problem import BilevelProblem, LargeUpperLevel
    from raybilevel.tune import (
        BilevelSearch,
        conclude,
        data_parallel_trainable,
        fold_parallel_trainable,
        hypergradient_trainable,
        lower_level_trainable,
    )

__all__ = [
    "BilevelProblem",
    "BilevelSearch",
    "CrossValidated",
    "LargeUpperLevel",
    "__version__",
    "conclude",
    "data_parallel_trainable",
    "fold_parallel_trainable",
    "hypergradient_trainable",
    "lower_level_trainable",
    "refit",
    "summarise",
]

__getattr__ = lazy_names(
    __name__,
    {
        "BilevelProblem": ".problem",
        "BilevelSearch": ".tune",
        "CrossValidated": ".folds",
        "LargeUpperLevel": ".problem",
        "conclude": ".tune",
        "data_parallel_trainable": ".tune",
        "fold_parallel_trainable": ".tune",
        "hypergradient_trainable": ".tune",
        "lower_level_trainable": ".tune",
        "refit": "._lower.training",
        "summarise": "._records.experiment",
    },
)


def __dir__() -> list[str]:
    return sorted(__all__)
