"""The resources of a plan's trainings and upper-level steps on the cluster that it runs on."""

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

STEP_GPU_SHARE = 0.2
"""The share of an only GPU that upper-level steps get."""


def for_tune(training: TrainingResources) -> dict[str, float] | tune.PlacementGroupFactory:
    """Resources in the form of `tune.with_resources`."""
    if training.strategy is not None:
        return tune.PlacementGroupFactory(list(training.bundles), training.strategy)
    return {name.lower() if name in ("CPU", "GPU") else name: amount for name, amount in training.first.items()}


def asked_for(training: TrainingResources) -> list[dict[str, float]]:
    """Resources of each process of a training, by Ray's names, without amounts of zero."""
    return [asked_by(task_options(bundle)) for bundle in training.bundles]


def with_room_for_steps(plan: Plan) -> Plan:
    """The plan, in which upper-level steps get a share of the GPU if the cluster has only one and trainings use it.

    Without a share each would wait for the other's process to end.
    """
    shares = ray.cluster_resources().get("GPU", 0) == 1 and plan.training.first.get("GPU") == 1
    chosen = plan.config.resources.upper is not None or plan.training.strategy is not None
    if not shares or chosen or not on_gpu(plan.problem):
        return plan
    training = TrainingResources(({**plan.training.first, "GPU": 1 - STEP_GPU_SHARE},))
    return replace(plan, training=training, step={"GPU": STEP_GPU_SHARE})


def check_room(training: TrainingResources, step: Mapping[str, float], alone: bool) -> None:
    """Check that a training and an upper-level step fit on the nodes. On a cluster only warn, as nodes may join.

    alone: whether the cluster is this machine alone.

    Raises:
        ConfigError: this machine, alone, lacks the resources.
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
    """Whether idle workers are kept for the next trials.

    Workers that hold a GPU, or anything that steps request, are not kept, as a step may be waiting for it. Nor are any
    if trials are retried: Tune (2.60) gives up a trial whose worker died while it was idle, e.g. with its node.
    """
    held = {name for bundle in asked_for(training) for name in bundle}
    return "GPU" not in held and not held & asked_by(task_options(step)).keys() and max_failures == 0
