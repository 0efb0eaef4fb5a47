"""The folds of a cross-validated training side by side, each a Ray task with resources of its own."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ray
from ray import tune
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from raybilevel._cluster.resources import bundles_of, task_options
from raybilevel._cluster.shared import Shared
from raybilevel.errors import ConfigError, ProblemError
from raybilevel.folds import CrossValidated, TrainedFold
from raybilevel.tune._trainable import check_arguments, own_loop


def fold_parallel_trainable(
    problem: CrossValidated,
    resources_per_fold: Mapping[str, float] | None = None,
    at_once: int | None = None,
    seed: int = 0,
) -> Callable[[dict[str, Any]], None]:
    """`lower_level_trainable` for a cross-validated problem, whose folds are trained side by side.

        trainable = fold_parallel_trainable(problem, {"cpu": 1})
        search = BilevelSearch(problem, max_concurrent=2)

    Results are those of `lower_level_trainable`. Where a cluster holds either, folds side by side are worth more to a
    search than trials side by side: each trial is proposed with what the others have found. `max_concurrent` has to say
    how many trials with all their folds the cluster holds.

    resources_per_fold: what a fold asks for, as `tune.with_resources` takes it; by default one GPU where the problem's
        device is "cuda", else one CPU.
    at_once: folds that are trained at the same time; all of them by default.

    Raises:
        ProblemError: `problem` is not a `CrossValidated` instance, or cannot be pickled.
        ConfigError: `at_once` is not from 2 to the number of folds.
    """
    check_arguments("fold_parallel_trainable", problem, None, None)
    if not isinstance(problem, CrossValidated):
        raise ProblemError(
            f"{type(problem).__name__}: fold_parallel_trainable takes a CrossValidated problem; use "
            "lower_level_trainable for one without folds"
        )
    folds = len(problem.problems)
    count = folds if at_once is None else at_once
    if not 2 <= count <= folds:
        raise ConfigError(
            f"at_once must be from 2 to the number of folds, {folds}, got {at_once}; lower_level_trainable trains one "
            "after the other"
        )
    bundles = bundles_of(resources_per_fold, problem) * count
    trainable = tune.with_parameters(folds_side_by_side, problem=Shared(problem), bundle=bundles[0], seed=seed)
    return tune.with_resources(trainable, tune.PlacementGroupFactory(bundles))  # type: ignore[no-any-return]


def folds_side_by_side(
    config: dict[str, Any], problem: Shared[CrossValidated], bundle: Mapping[str, float], seed: int
) -> None:
    """What a trial runs."""
    logging.getLogger("ray.train._internal.storage").setLevel(logging.WARNING)  # five lines a trial, none of them news
    # A copy, as the process shares the problem with other trials.
    own = copy.copy(problem.value)
    own.train_folds = OnTasks(problem, bundle)  # type: ignore[method-assign]
    own_loop(config, own, seed)


class OnTasks:
    """Folds as Ray tasks in the placement group of this trial, each in a bundle of its own. The first one is trained in
    the trial's own process, which has the first bundle."""

    def __init__(self, problem: Shared[CrossValidated], bundle: Mapping[str, float]) -> None:
        self.problem, self.options = problem, task_options(bundle)

    def __call__(self, config: Mapping[str, Any], seed: int, folds: Sequence[int]) -> Iterator[TrainedFold]:
        if not folds:  # a trial that is tried again after its last one
            return
        group = PlacementGroupSchedulingStrategy(ray.util.get_current_placement_group())
        task = ray.remote(**self.options, scheduling_strategy=group)(train_fold)
        problem = ray.put(self.problem)
        under_way = [task.remote(problem, config, seed, fold) for fold in folds[1:]]
        try:
            yield self.problem.value.train_fold(config, seed, folds[0])
            for result in under_way:
                yield ray.get(result)
        finally:
            # Of a trial that is stopped, or of which a fold has failed; those that have ended do not mind.
            for result in under_way:
                ray.cancel(result)


def train_fold(problem: Shared[CrossValidated], config: Mapping[str, Any], seed: int, fold: int) -> TrainedFold:
    """What a task runs."""
    found = problem.value.train_fold(config, seed, fold)
    # The trial's process may not have the accelerator of this one.
    return found._replace(
        weights={name: tensor.cpu() for name, tensor in found.weights.items()},
        times={name: tensor.cpu() for name, tensor in found.times.items()},
    )
