"""Resources that trainings and upper-level steps request from a Ray cluster, and how many trainings fit into it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ray
from ray.tune import PlacementGroupFactory

from raybilevel.problem import BilevelProblem

MIN_SLOT_LIMIT = 16
SLOT_LIMIT_DIVISOR = 4
TASK_OPTIONS = (
    "num_cpus", "num_gpus", "memory", "resources", "accelerator_type", "scheduling_strategy", "label_selector",
    "max_retries", "runtime_env",
)  # fmt: skip


def most_slots(trainings: int) -> int:
    """The default limit of concurrent trainings: 16, or a quarter of all trainings if that is more."""
    return max(MIN_SLOT_LIMIT, trainings // SLOT_LIMIT_DIVISOR)


def bundles_of(
    resources: Mapping[str, float] | PlacementGroupFactory | None, problem: BilevelProblem
) -> list[dict[str, float]]:
    """Resources of each process of a training, by Ray's names. The default is a GPU if the problem is on one, else a
    CPU."""
    if resources is None:
        resources = {"gpu": 1.0} if on_gpu(problem) else {"cpu": 1.0}
    bundles = resources.bundles if isinstance(resources, PlacementGroupFactory) else [resources]
    return [asked_by(task_options(one)) for one in bundles]


def trainings_that_fit(bundles: Sequence[Mapping[str, float]]) -> int:
    """How many trainings fit at once into the cluster that this process has joined; 0 if it has joined none."""
    return fitting([node["Resources"] for node in nodes_alive()] if ray.is_initialized() else [], bundles)


def fitting(nodes: Sequence[Mapping[str, float]], bundles: Sequence[Mapping[str, float]]) -> int:
    """How many trainings of these bundles the nodes hold at once.

    A training of one bundle must fit on one node. For several bundles the resources of all nodes are added up, which is
    an upper bound. A training that requests nothing counts as one CPU.
    """
    wanted = summed(bundles) or {"CPU": 1.0}
    holders = [summed(nodes)] if len(bundles) > 1 else nodes
    # 1e-9, since 0.6 / 0.2 is 2.9999999999999996.
    return sum(min(int(holder.get(name, 0.0) / n + 1e-9) for name, n in wanted.items()) for holder in holders)


def asked_by(options: Mapping[str, Any]) -> dict[str, float]:
    """The resources that a Ray task with these options requests, by Ray's names."""
    named = {"CPU": options.get("num_cpus"), "GPU": options.get("num_gpus"), "memory": options.get("memory")}
    return {name: float(n) for name, n in {**named, **options.get("resources", {})}.items() if n}


def summed(amounts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for one in amounts:
        for name, amount in one.items():
            total[name] = total.get(name, 0.0) + amount
    return total


def nodes_alive() -> list[dict[str, Any]]:
    """The living nodes of the cluster that this process has joined, as `ray.nodes` describes them."""
    return [node for node in ray.nodes() if node["Alive"]]


def default_resources(problem: BilevelProblem) -> dict[str, Any]:
    """Resources of a step. It requests no CPU: it replaces a training, whose idle actor may still hold the CPU."""
    return {"num_cpus": 0, "num_gpus": 1} if on_gpu(problem) else {"num_cpus": 0}


def on_gpu(problem: BilevelProblem) -> bool:
    return str(problem.device).startswith("cuda")


def step_options(upper: Mapping[str, Any] | None, problem: BilevelProblem) -> dict[str, Any]:
    """Options of the Ray task of an upper-level step. upper: the resources requested; None for the default."""
    return default_resources(problem) if upper is None else task_options(upper)


def task_options(resources: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a Ray task from resources by Tune's names, custom ones included. The default is no CPU."""
    names = {"cpu": "num_cpus", "gpu": "num_gpus"}
    given = {names.get(name.lower(), name): amount for name, amount in resources.items()}
    options = {name: amount for name, amount in given.items() if name in TASK_OPTIONS}
    custom = {name: amount for name, amount in given.items() if name not in TASK_OPTIONS}
    if custom:
        options["resources"] = {**options.get("resources", {}), **custom}
    return {"num_cpus": 0, **options}  # Ray's own default is one CPU
