"""What a trial reports, in the terms of the search."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from ray.tune.utils.util import flatten_dict

from raybilevel._metric_bounds import Bounds
from raybilevel._metrics import FINISHED, GRADIENT, LOWER_LOSS, PASSES, UPPER_LOSS
from raybilevel._objectives import Others
from raybilevel.errors import RaybilevelError
from raybilevel.search import Observation
from raybilevel.space import Space

HOW_TO_REPORT = "return it from evaluate, or give it to raybilevel.conclude"


class MetricError(RaybilevelError):
    """A trial reported a result without a metric that the search needs, or one that is no number.

    metric: which. missing: it is not there at all.
    """

    def __init__(self, what: str, metric: str, missing: bool) -> None:
        super().__init__(what)
        self.metric, self.missing = metric, missing


@dataclass(frozen=True)
class Objective:
    """What Tune has a search optimise; the search itself minimises."""

    metric: str = UPPER_LOSS
    mode: str = "min"

    @property
    def sign(self) -> float:
        return -1.0 if self.mode == "max" else 1.0

    def observe(
        self,
        trial: str,
        result: Mapping[str, Any],
        space: Space,
        unit: Sequence[float],
        bounds: Bounds = (),
        others: Others = (),
    ) -> Observation:
        """A trial's last result, nested or flat.

        unit:   the trial's point of the unit cube, shape (d,).
        bounds, others: of metrics that the trial is to report. One that was stopped early need not have reported them
            yet.

        An entry of the gradient that a trainable does not report is NaN: not known.

        Raises:
            MetricError: the metric, the lower-level loss, a metric that has a bound or another objective is missing, or
                a value is no number.
        """
        flat = flatten_dict(dict(result))

        def number(name: str, default: float | None = None) -> float:
            if name not in flat and default is None:
                hint = "is its trainable lower_level_trainable(problem)?"
                if name in (bound.metric for bound in bounds):
                    hint = f"constraints has a bound on it: {HOW_TO_REPORT}"
                elif name in (other.metric for other in others):
                    hint = f"it is an objective: {HOW_TO_REPORT}"
                why = f"trial {trial} reported no {name!r}; {hint}"
                raise MetricError(why, name, missing=True)
            value = flat.get(name, default)
            try:
                return float(value)
            except (TypeError, ValueError, RuntimeError) as error:
                why = f"trial {trial} reported {name} = {value!r}; report a number."
                raise MetricError(why, name, missing=False) from error

        upper, lower, passes = self.sign * number(self.metric), number(LOWER_LOSS), number(PASSES, 0.0)
        # Tune's own "done" is true after a scheduler's stop as well.
        finished = flat.get(FINISHED, False)
        default = None if finished else math.nan
        excesses = tuple(bound.excess(number(bound.metric, default)) for bound in bounds)
        minimised = tuple(other.minimised(number(other.metric, default)) for other in others)
        if not finished:
            return Observation(upper, passes=passes, complete=False, excesses=excesses, others=minimised)
        gradient = {name: number(f"{GRADIENT}/{name}", math.nan) for name in space.names}
        point = torch.tensor(unit, dtype=torch.double)
        in_unit_cube = space.to_unit_gradient(space.to_config(point), gradient, point)
        in_order = tuple(in_unit_cube.tolist())
        return Observation(upper, lower, in_order, passes, excesses=excesses, others=minimised)


def ran_to_its_end(result: Mapping[str, Any]) -> bool:
    return bool(flatten_dict(dict(result)).get(FINISHED, False))
