"""What a plan's trainings and upper-level steps get of the cluster that it runs on."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

import ray
from ray import tune

from raybilevel._cluster.resources import asked_by, on_gpu, summed, task_options, trainings_that_fit
from raybilevel._config.plan import Plan
from raybilevel._config.resources import TrainingResources
from raybilevel.errors import ConfigError

logger = logging.getLogger(__name__)

STEPS_SHARE_OF_GPU = 0.2
"""What upper-level steps get of the only GPU."""


def for_tune(training: TrainingResources) -> dict[str, float] | tune.PlacementGroupFactory:
    """As `tune.with_resources` takes it."""
    if training.strategy is not None:
        return tune.PlacementGroupFactory(list(training.bundles), training.strategy)
    return {name.lower() if name in ("CPU", "GPU") else name: amount for name, amount in training.first.items()}


def asked_for(training: TrainingResources) -> list[dict[str, float]]:
    """What each process of a training asks for, by Ray's names; without what it asks nothing of."""
    return [asked_by(task_options(bundle)) for bundle in training.bundles]


def with_room_for_steps(plan: Plan) -> Plan:
    """The plan, where the cluster's only GPU is a training's, with a share of it for upper-level steps.

    Else each would wait for the other's process to end.
    """
    shares = ray.cluster_resources().get("GPU", 0) == 1 and plan.training.first.get("GPU") == 1
    chosen = plan.config.resources.upper is not None or plan.training.strategy is not None
    if not shares or chosen or not on_gpu(plan.problem):
        return plan
    training = TrainingResources(({**plan.training.first, "GPU": 1 - STEPS_SHARE_OF_GPU},))
    return replace(plan, training=training, step={"GPU": STEPS_SHARE_OF_GPU})


def check_room(training: TrainingResources, step: Mapping[str, float], alone: bool) -> None:
    """Whether there are nodes with what a training and an upper-level step ask for; on a cluster one may join later.

    alone: none will join.

    Raises:
        ConfigError: this machine, alone, has not that much.
    """
    upper = [asked_by(task_options(step))]
    for key, what, asked in (("lower", "a training", asked_for(training)), ("upper", "an upper-level step", upper)):
        if not any(asked) or trainings_that_fit(asked) > 0:
            continue
        wanted = " + ".join(", ".join(f"{name}: {n:g}" for name, n in bundle.items()) for bundle in asked)
        text = f"resources.{key}: {what} asks for {{{wanted}}}"
        if alone:
            has = ray.cluster_resources()
            there = ", ".join(f"{name}: {has.get(name, 0.0):g}" for name in sorted(summed(asked)))
            raise ConfigError(f"{text}, this machine has {{{there}}}; ask for less, or join a cluster by --address")
        logger.warning("%s, which no node of the cluster has; it waits for one that joins", text)


def reuses_processes(training: TrainingResources, step: Mapping[str, float], max_failures: int = 0) -> bool:
    """Whether idle processes are kept for the next trials: none that has a GPU, or anything that steps ask for, for
    which one may be waiting, and none where trials are to be tried again, as Tune (2.60) gives a trial up whose process
    died idle, e.g. with its node."""
    held = {name for bundle in asked_for(training) for name in bundle}
    return "GPU" not in held and not held & asked_by(task_options(step)).keys() and max_failures == 0
