"""What trainings and upper-level steps ask of a Ray cluster, and how many trainings fit into it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ray
from ray.tune import PlacementGroupFactory

from raybilevel.problem import BilevelProblem

MOST_SLOTS = 16
SHARE_AT_ONCE = 4
TASK_OPTIONS = (
    "num_cpus", "num_gpus", "memory", "resources", "accelerator_type", "scheduling_strategy", "label_selector",
    "max_retries", "runtime_env",
)  # fmt: skip


def most_slots(trainings: int) -> int:
    """Trainings at once at the most, of so many in all, unless the user says how many."""
    return max(MOST_SLOTS, trainings // SHARE_AT_ONCE)


def bundles_of(
    resources: Mapping[str, float] | PlacementGroupFactory | None, problem: BilevelProblem
) -> list[dict[str, float]]:
    """What each process of a training asks for, by Ray's names."""
    if resources is None:
        resources = {"gpu": 1.0} if on_gpu(problem) else {"cpu": 1.0}
    bundles = resources.bundles if isinstance(resources, PlacementGroupFactory) else [resources]
    return [asked_by(task_options(one)) for one in bundles]


def trainings_that_fit(bundles: Sequence[Mapping[str, float]]) -> int:
    """Into the cluster that this process has joined, at once; 0 where it has joined none."""
    return fitting([node["Resources"] for node in nodes_alive()] if ray.is_initialized() else [], bundles)


def fitting(nodes: Sequence[Mapping[str, float]], bundles: Sequence[Mapping[str, float]]) -> int:
    """How many trainings of these bundles nodes with these resources hold at once: each node on its own, or all of them
    together, whatever a node holds, where a training has several bundles. One a CPU where it asks for nothing."""
    wanted = summed(bundles) or {"CPU": 1.0}
    holders = [summed(nodes)] if len(bundles) > 1 else nodes
    return sum(min(int(holder.get(name, 0.0) / n + 1e-9) for name, n in wanted.items()) for holder in holders)


def asked_by(options: Mapping[str, Any]) -> dict[str, float]:
    """What a Ray task of these options asks for, by Ray's names."""
    named = {"CPU": options.get("num_cpus"), "GPU": options.get("num_gpus"), "memory": options.get("memory")}
    return {name: float(n) for name, n in {**named, **options.get("resources", {})}.items() if n}


def summed(amounts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for one in amounts:
        for name, amount in one.items():
            total[name] = total.get(name, 0.0) + amount
    return total


def nodes_alive() -> list[dict[str, Any]]:
    """Of the cluster that this process has joined, in Ray's words."""
    return [node for node in ray.nodes() if node["Alive"]]


def default_resources(problem: BilevelProblem) -> dict[str, Any]:
    """A step runs in the place of a training, whose (cached) actor may still hold its CPU: so it asks for none."""
    return {"num_cpus": 0, "num_gpus": 1} if on_gpu(problem) else {"num_cpus": 0}


def on_gpu(problem: BilevelProblem) -> bool:
    return str(problem.device).startswith("cuda")


def step_options(upper: Mapping[str, Any] | None, problem: BilevelProblem) -> dict[str, Any]:
    """Options of the Ray task that is an upper-level step. upper: what was asked for it, None for the default."""
    return default_resources(problem) if upper is None else task_options(upper)


def task_options(resources: Mapping[str, Any]) -> dict[str, Any]:
    """Tune's names of resources, custom ones among them -> options of a Ray task, which by itself asks for no CPU."""
    names = {"cpu": "num_cpus", "gpu": "num_gpus"}
    given = {names.get(name.lower(), name): amount for name, amount in resources.items()}
    options = {name: amount for name, amount in given.items() if name in TASK_OPTIONS}
    custom = {name: amount for name, amount in given.items() if name not in TASK_OPTIONS}
    if custom:
        options["resources"] = {**options.get("resources", {}), **custom}
    return {"num_cpus": 0, **options}
