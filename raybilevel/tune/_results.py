"""What a trial reports, in the terms of the search."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray.tune.utils.util import flatten_dict

from raybilevel._metrics import FINISHED, GRADIENT, LOWER_LOSS, PASSES, UPPER_LOSS
from raybilevel.errors import RaybilevelError
from raybilevel.search import Observation
from raybilevel.space import Space


class MissingMetricError(RaybilevelError):
    """A trial reported a result without a metric that the search needs."""

    def __init__(self, trial: str, metric: str) -> None:
        super().__init__(f"trial {trial} reported no {metric!r}; is its trainable lower_level_trainable(problem)?")
        self.metric = metric


@dataclass(frozen=True)
class Objective:
    """What Tune has a search optimise; the search itself minimises."""

    metric: str = UPPER_LOSS
    mode: str = "min"

    @property
    def sign(self) -> float:
        return -1.0 if self.mode == "max" else 1.0

    def observe(self, trial: str, result: Mapping[str, Any], space: Space, config: Mapping[str, Any]) -> Observation:
        """A trial's last result, nested or flat.

        config: the trial's, nested as the space is.

        An entry of the gradient that a trainable does not report is NaN: not known.

        Raises:
            MissingMetricError: the metric or the lower-level loss is missing.
        """
        flat = flatten_dict(dict(result))
        for needed in (self.metric, LOWER_LOSS):
            if needed not in flat:
                raise MissingMetricError(trial, needed)
        upper, passes = self.sign * float(flat[self.metric]), float(flat.get(PASSES, 0.0))
        if not flat.get(FINISHED, False):
            return Observation(upper, passes=passes, complete=False)
        gradient = {name: float(flat.get(f"{GRADIENT}/{name}", math.nan)) for name in space.names}
        unit = space.to_unit_gradient(config, gradient)
        return Observation(upper, float(flat[LOWER_LOSS]), tuple(unit.tolist()), passes)


def ran_to_its_end(result: Mapping[str, Any]) -> bool:
    return bool(flatten_dict(dict(result)).get(FINISHED, False))
