"""The refit: a training on all data with the best hyperparameters of a run, or with ones of a kind nearer together."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import ray

from raybilevel._cluster.resources import task_options
from raybilevel._cluster.shared import Shared
from raybilevel._cluster.time_limit import time_limit
from raybilevel._config.plan import Plan
from raybilevel._lower.training import refit
from raybilevel._models.for_refit import SPREADS, ForRefit, can_be_nearer, config_for_refit
from raybilevel.problem import BilevelProblem
from raybilevel.search_state import Shrinkage
from raybilevel.space import Space

logger = logging.getLogger(__name__)


def chosen_for_refit(plan: Plan, found: Mapping[str, Any], shrinkage: Shrinkage | None) -> ForRefit:
    """What to refit with. It is the result of the search, if the method does not hold hyperparameters of a kind
    together, or if the trainings that would tell fail.

    found:     the config of the training, nested.
    shrinkage: what the search learned of groups.
    """
    if not getattr(plan.method, "generalise", False) or not can_be_nearer(plan.problem, found, plan.space):
        return ForRefit(found)
    # For all trainings, each with epochs of up to twice the time.
    limit = plan.epoch_time_limit and 2 * (1 + len(SPREADS)) * 2 * plan.problem.epochs * plan.epoch_time_limit
    task = choice_task.options(**refit_options(plan))
    try:
        chosen: ForRefit = ray.get(task.remote(Shared(plan.problem), found, plan.space, shrinkage, plan.seed, limit))
    except ray.exceptions.RayError as error:
        logger.error("the refit is with the result of the search: %s", str(error).splitlines()[-1])
        return ForRefit(found)
    return chosen


def loss_after_refit(plan: Plan, found: Mapping[str, Any]) -> float | None:
    """The test loss after a training on all data. None if the problem has no test loss, or if the training fails: the
    result of the search must not be lost with it.

    found: the config of the training, nested.
    """
    # For the whole training, with epochs of up to twice the time, as they include the validation data.
    limit = plan.epoch_time_limit and 2 * plan.problem.epochs * plan.epoch_time_limit
    refitted = refit_task.options(**refit_options(plan)).remote(Shared(plan.problem), found, plan.seed, limit)
    try:
        metrics = ray.get(refitted)
    except ray.exceptions.RayError as error:
        logger.error("the refit on all data failed, the summary is without it: %s", str(error).splitlines()[-1])
        return None
    return (metrics or {}).get("test_loss")


def refit_options(plan: Plan) -> dict[str, Any]:
    """Options of the Ray task: the resources of a training's first process."""
    return task_options({"CPU": 1, **plan.training.first})


@ray.remote(max_retries=1)  # type: ignore[untyped-decorator]
def refit_task(
    problem: Shared[BilevelProblem], config: Mapping[str, Any], seed: int, limit: float | None = None
) -> dict[str, float] | None:
    """The metrics after the training. limit: its timeout in seconds."""
    with time_limit(limit):
        return refit(problem.value, config, seed)


@ray.remote(max_retries=1)  # type: ignore[untyped-decorator]
def choice_task(
    problem: Shared[BilevelProblem],
    config: Mapping[str, Any],
    space: Space,
    shrinkage: Shrinkage | None,
    seed: int,
    limit: float | None = None,
) -> ForRefit:
    """limit: timeout in seconds."""
    with time_limit(limit):
        return config_for_refit(problem.value, config, space, shrinkage, seed)
