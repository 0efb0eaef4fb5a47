"""Bilevel hyperparameter optimization on Ray clusters."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from raybilevel.version import __version__

if TYPE_CHECKING:
    from raybilevel.descent_trainable import hypergradient_trainable
    from raybilevel.problem import BilevelProblem
    from raybilevel.searcher import BilevelSearch
    from raybilevel.trainable import lower_level_trainable

__all__ = ["BilevelProblem", "BilevelSearch", "__version__", "hypergradient_trainable", "lower_level_trainable"]

_HOMES = {
    "BilevelProblem": "problem",
    "BilevelSearch": "searcher",
    "hypergradient_trainable": "descent_trainable",
    "lower_level_trainable": "trainable",
}


def __getattr__(name: str) -> Any:
    """Torch, Ray and the models take seconds to import: a usage error or a worker that only trains need not wait."""
    if name in _HOMES:
        return getattr(import_module(f"raybilevel.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'raybilevel' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
