"""The gain over other trainings by the losses of single examples, at the end of a run."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
from pyarrow.fs import FileSystem

from raybilevel._cluster.shared import Shared
from raybilevel._cluster.step_call import read_checkpoint
from raybilevel._cluster.time_limit import time_limit
from raybilevel._command.refit import refit_options
from raybilevel._config.plan import Plan
from raybilevel._lower.paired import Gain, Weights, paired_gains
from raybilevel.problem import BilevelProblem

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ended:
    """A training run that has ended: its config with constants, nested, and the folder of its checkpoint."""

    config: Mapping[str, Any]
    checkpoint: str


def gains_over(
    plan: Plan, before: Mapping[int, Ended], result: Ended, filesystem: FileSystem
) -> Mapping[int, Gain | None]:
    """By the keys of `before`. Nothing if losses of single examples cannot be computed: the result of the search must
    not be lost with them."""
    # A pass over the data for each, which is less than as many epochs take.
    limit = plan.epoch_time_limit and (1 + len(before)) * plan.epoch_time_limit
    found = gain_task.options(**refit_options(plan)).remote(Shared(plan.problem), before, result, filesystem, limit)
    try:
        gains: Mapping[int, Gain | None] = ray.get(found)
    except ray.exceptions.RayError as error:
        logger.error("the standard error of the gain is not known: %s", str(error).splitlines()[-1])
        return {}
    return gains


@ray.remote(max_retries=1)  # type: ignore[untyped-decorator]
def gain_task(
    problem: Shared[BilevelProblem],
    before: Mapping[int, Ended],
    result: Ended,
    filesystem: FileSystem,
    limit: float | None = None,
) -> dict[int, Gain | None]:
    """limit: timeout in seconds."""

    def weights(one: Ended) -> Weights:
        return Weights(one.config, read_checkpoint(one.checkpoint, filesystem)["model"])

    with time_limit(limit):
        return paired_gains(problem.value, {key: weights(one) for key, one in before.items()}, weights(result))
