"""What a training tells of its weights: both levels' values, df/dx, and the problem's own metrics."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch

from raybilevel._lower.functions import finite
from raybilevel._lower.levels import Levels
from raybilevel._lower.variables import ConfigVariables
from raybilevel._metrics import LOWER_LOSS, UPPER_LOSS
from raybilevel._tree import named
from raybilevel.problem import BilevelProblem, evaluate
from raybilevel.space import nest

logger = logging.getLogger(__name__)


class Observed:
    """A problem at a trial's config.

    levels: at the weights that are observed.
    """

    levels: Levels

    def __init__(self, problem: BilevelProblem, config: Mapping[str, Any]) -> None:
        self.problem, self.config = problem, dict(config)
        self.variables = ConfigVariables(config, problem)
        self.hyperparameters = self.variables.given(self.variables.x)

    @property
    def passes(self) -> float:
        """What it cost so far, in gradient evaluations of f."""
        return self.levels.passes

    def upper(self) -> float:
        """F at the present weights.

        Raises:
            NotFiniteError: it is NaN or infinite.
        """
        return finite("upper", self.levels.value("upper", self.variables.x, self.levels.y))

    def losses(self) -> dict[str, float]:
        """f and F at the present weights, and the problem's own metrics.

        Raises:
            NotFiniteError: f or F is NaN or infinite.
            ProblemError: `evaluate` returned something else than numbers, or one under a reserved name.
        """
        metrics, x, y = self.metrics(), self.variables.x, self.levels.y
        lower, upper = finite("lower", self.levels.value("lower", x, y)), self.upper()
        return {LOWER_LOSS: lower, UPPER_LOSS: upper, **metrics, self.problem.upper_metric: upper}

    def gradient(self) -> dict[str, Any]:
        """df/dx at the present weights, by Danskin's theorem dv/dx; nested as the config is, in the hyperparameters'
        own units. Floats that f does not depend on have gradient 0. An entry that is not finite, as that of a square
        root at 0, is NaN: it is not known. It is charged as one pass.

        Raises:
            NotFiniteError: f is NaN or infinite.
        """
        found = self.levels.lower(self.variables.x, self.levels.y)
        finite("lower", found.value)
        # A NaN in one entry must not cost the others, so each is judged by itself.
        numbers = dict(zip(self.variables.paths, found.in_x.tolist(), strict=True))
        for path, number in numbers.items():
            if not math.isfinite(number):
                logger.warning(
                    "the lower level's gradient in %s is %s at %s; it is left out", named(path), number, self.config
                )
                numbers[path] = math.nan
        return nest({tuple(map(str, path)): number for path, number in numbers.items()})

    @property
    def unknown_gradient(self) -> dict[str, Any]:
        """NaN in each place of `gradient`."""
        return nest(dict.fromkeys(self.variables.paths, math.nan))

    def metrics(self) -> dict[str, float]:
        """What the problem's `evaluate` says of the present weights."""
        self.levels.model.eval()
        with torch.no_grad():
            return evaluate(self.problem, self.levels.model, self.hyperparameters)
