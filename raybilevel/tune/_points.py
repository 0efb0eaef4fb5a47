"""Configurations as users and Tune hand them over."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from raybilevel.search import BilevelOptimizer
from raybilevel.space import flatten, nest

logger = logging.getLogger(__name__)


def reported_config(result: Mapping[str, Any] | None) -> dict[str, Any]:
    """The config that Tune adds to every result, whether it is nested or flat."""
    config = unflatten(result or {}).get("config", {})
    return config if isinstance(config, dict) else {}


def unflatten(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Tune hands evaluated points over flat ("a/b") or nested; nested is what the space reads."""
    return nest({tuple(key for part in path for key in part.split("/")): v for path, v in flatten(parameters).items()})


def trained_in_the_space(optimizer: BilevelOptimizer, trial: str, result: Mapping[str, Any]) -> bool:
    """Whether a training was done at a point of the space: where it was asked, or else where it now counts."""
    trained = reported_config(result)
    if not trained or optimizer.was_asked(trial, trained):
        return True
    asked, moved = optimizer.config(trial), optimizer.move(trial, trained)
    follows = "its result counts there" if moved else "that is no point of the space, and it counts as failed"
    logger.warning(
        "trial %s was trained at %s and not at %s as asked; %s. Does a scheduler change hyperparameters, or the "
        "trainable its config?", trial, trained, asked, follows,
    )  # fmt: skip
    return moved
