"""A whole bilevel descent as a Tune trial."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from ray import tune

from raybilevel._cluster.shared import Shared
from raybilevel._cluster.time_limit import time_limit
from raybilevel._metrics import FINISHED, PASSES, STEP
from raybilevel.errors import ProblemError
from raybilevel.hypergradient import DescentSettings
from raybilevel.hypergradient._descent import CHECKPOINT_FILE, BilevelDescent, dump_checkpoint, load_checkpoint
from raybilevel.problem import BilevelProblem, LargeUpperLevel
from raybilevel.space import STARTS, Space
from raybilevel.tune._domains import split_param_space
from raybilevel.tune._trainable import (
    check_arguments,
    check_no_hooks,
    check_not_optimistic,
    default_checkpoint_interval,
    restore,
    send,
)


def hypergradient_trainable(
    problem: BilevelProblem,
    settings: DescentSettings | None = None,
    space: Space | Mapping[str, Any] | None = None,
    seed: int = 0,
    checkpoint_every: int | None = None,
    epoch_time_limit: float | None = None,
) -> Callable[[dict[str, Any]], None]:
    """A trainable for `tune.run` and `tune.Tuner`, with `BilevelSearch(problem, method="hypergradient")`: one descent
    along hypergradients from the trial's config.

    It reports every step `upper_loss` and `lower_loss` (F and f at the weights of the descent), `hypergradient_norm`,
    what linear solves took so far, `solver_residual`, the relative residual of the last one, and how well the lower
    level was solved: `lower_gradient_norm`, or `lower_residual` of a fixed point; at the end F and f at weights trained
    anew, what the problem's `evaluate` returns, `hyperparameters` where x is a point of a box, and a checkpoint with
    x and y. A restarted trial goes on from its last checkpoint.

    settings: of the descent; those that the searcher has.
    space:    the search space, as a Tune `param_space`; None where x is the problem's `upper_variables`: then give
        Tune {"start": tune.quniform(0, 65535, 1)}.
    seed:     of the initial weights and the order of batches; of a module's start, with its number.
    checkpoint_every: steps between checkpoints; None for five in a descent.
    epoch_time_limit: seconds that an epoch of the lower level may take, a step's hypergradient counted as one more; a
        descent whose step takes longer than all of its epochs may is treated as hung and its worker killed. None for
        no limit.

    Raises:
        ProblemError: `problem` is not a `BilevelProblem` instance, is `optimistic`, sets `schedule`, `patience`,
            `autocast` or `ema`, has neither a space nor `upper_variables`, or cannot be divided into the settings'
            shards.
        ConfigError: `checkpoint_every` or `epoch_time_limit` is not positive.
    """
    check_arguments("hypergradient_trainable", problem, checkpoint_every, epoch_time_limit)
    check_not_optimistic("hypergradient_trainable", problem)
    check_no_hooks("hypergradient_trainable", problem, "schedule", "patience", "autocast", "ema")
    if space is not None and not isinstance(space, Space):
        space, _ = split_param_space(space)
    space = space or STARTS
    box = None if space.of_starts else space
    if box is None and not isinstance(problem, LargeUpperLevel):
        raise ProblemError(
            f"{type(problem).__name__} is no LargeUpperLevel with upper_variables(); derive it from "
            "raybilevel.LargeUpperLevel, or give the search space"
        )
    settings = settings or DescentSettings()
    settings.check(problem, space)
    every = checkpoint_every or default_checkpoint_interval(settings.steps)
    trainable: Callable[[dict[str, Any]], None] = tune.with_parameters(
        descend, problem=Shared(problem), settings=settings, space=box, seed=seed, checkpoint_every=every,
        epoch_time_limit=epoch_time_limit,
    )  # fmt: skip
    return trainable


def descend(
    config: dict[str, Any],
    problem: Shared[BilevelProblem],
    settings: DescentSettings,
    space: Space | None,
    seed: int,
    checkpoint_every: int,
    epoch_time_limit: float | None,
) -> None:
    """What a trial runs."""
    logging.getLogger("ray.train._internal.storage").setLevel(logging.WARNING)  # five lines a trial, none of them news
    with time_limit(epoch_time_limit):
        descent = BilevelDescent(problem.value, config, settings, space, seed)
    restore(descent, tune.get_checkpoint(), CHECKPOINT_FILE, load_checkpoint)
    while not descent.finished:
        epochs = 1 + (settings.lower_epochs if descent.step else problem.value.epochs)
        # After the last step the lower level is trained anew.
        if descent.step + 1 == settings.steps:
            epochs += problem.value.epochs
        with time_limit(epoch_time_limit and epoch_time_limit * epochs):
            metrics: dict[str, Any] = {**descent.run_step(), STEP: descent.step}
            if descent.finished:
                metrics |= descent.conclude()
        metrics |= {PASSES: descent.passes, FINISHED: descent.finished}
        due = descent.finished or descent.step % checkpoint_every == 0
        send(metrics, CHECKPOINT_FILE, dump_checkpoint(descent) if due else None)
