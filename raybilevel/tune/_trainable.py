"""A lower-level training as a Tune trial."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ray
from ray import tune

from raybilevel._cluster.identity import identity_of
from raybilevel._cluster.pickling import check_can_be_sent
from raybilevel._cluster.shared import Shared
from raybilevel._cluster.time_limit import time_limit
from raybilevel._lower.own_loop import OWN_FILE, OwnTraining, train_itself
from raybilevel._lower.training import CHECKPOINT_FILE, LowerLevelTraining, dump_checkpoint, load_checkpoint
from raybilevel._metrics import CHECKPOINT_DIR_NAME, EPOCH, FINISHED, GPUS, GRADIENT, PASSES, PROBLEM, TRIAL_PATH
from raybilevel.errors import ConfigError, ProblemError
from raybilevel.problem import BilevelProblem, trains_itself


def lower_level_trainable(
    problem: BilevelProblem,
    seed: int = 0,
    checkpoint_every: int | None = None,
    epoch_time_limit: float | None = None,
) -> Callable[[dict[str, Any]], None]:
    """A trainable for `tune.run` and `tune.Tuner`: one lower-level training at the trial's config.

    It reports every `problem.evaluate_every` epochs `lower_loss` (f), `upper_loss` (F at the weights so far) and what
    the problem's `evaluate` returns; at the end also `lower_gradient` (df/dx, nested as the config is),
    `lower_level_finished=True` and a checkpoint. The first report has NaN in the place of `lower_gradient`, so that
    Tune's progress.csv has columns for it. A restarted trial goes on from its last checkpoint.
    A problem with a `train` of its own trains itself and reports when it likes; at the end there is the same.

    seed:             of the initial weights and the order of batches; the same for every trial.
    checkpoint_every: epochs between checkpoints; None for five in a training.
    epoch_time_limit: seconds that an epoch, its losses included, may take; a training that takes longer is treated as
        hung and its worker killed. None for no limit. Its report is not part of that: a scheduler may hold that up.

    Raises:
        ProblemError: `problem` is not a `BilevelProblem` instance, or cannot be pickled.
        ConfigError: `checkpoint_every` or `epoch_time_limit` is not positive, or the problem trains itself.
    """
    check_arguments("lower_level_trainable", problem, checkpoint_every, epoch_time_limit)
    if trains_itself(problem) and (checkpoint_every, epoch_time_limit) != (None, None):
        raise ConfigError(
            f"checkpoint_every, epoch_time_limit: {type(problem).__name__} trains itself, in whatever epochs; leave "
            "them out, and give `report` a checkpoint when one is due"
        )
    every = checkpoint_every or default_checkpoint_interval(problem.epochs)
    trainable: Callable[[dict[str, Any]], None] = tune.with_parameters(
        lower_level, problem=Shared(problem), identity=identity_of(problem), seed=seed, checkpoint_every=every,
        epoch_time_limit=epoch_time_limit,
    )  # fmt: skip
    return trainable


def check_arguments(
    function: str, problem: object, checkpoint_every: int | None, epoch_time_limit: float | None
) -> None:
    """What all functions that make a trainable refuse; `function` is the one that was called."""
    if not isinstance(problem, BilevelProblem):
        hint = f"; pass an instance: {function}(MyProblem())" if isinstance(problem, type) else ""
        raise ProblemError(f"expected a BilevelProblem, got {problem!r}{hint}")
    check_can_be_sent(problem)
    if checkpoint_every is not None and checkpoint_every < 1:
        raise ConfigError(f"checkpoint_every must be at least 1, got {checkpoint_every}")
    if epoch_time_limit is not None and not epoch_time_limit > 0:
        raise ConfigError(f"epoch_time_limit must be positive, got {epoch_time_limit}")


def check_not_optimistic(function: str, problem: BilevelProblem) -> None:
    if problem.optimistic:
        raise ProblemError(
            f"{type(problem).__name__}.optimistic: {function} does not choose among minimisers of f; set it to False, "
            "or use lower_level_trainable and a search by the default method"
        )


def check_no_hooks(function: str, problem: BilevelProblem, *hooks: str) -> None:
    """Refuse hooks of a problem's loop, and loops of its own, that this kind of training does not have."""
    if trains_itself(problem):
        hooks = ("train", *hooks)
    for hook in hooks:
        if getattr(type(problem), hook, None) != getattr(BilevelProblem, hook, None) or hook in vars(problem):
            raise ProblemError(
                f"{type(problem).__name__}.{hook}: {function} does not have it; leave it out, or use "
                "lower_level_trainable and a search by the default method"
            )


def default_checkpoint_interval(count: int) -> int:
    """Epochs or steps between checkpoints, of so many in all: there are at most five."""
    # Rounded up, so that there are no more than five.
    return max(1, -(-count // 5))


def lower_level(
    config: dict[str, Any],
    problem: Shared[BilevelProblem],
    identity: str,
    seed: int,
    checkpoint_every: int,
    epoch_time_limit: float | None,
) -> None:
    """What a trial runs.

    identity: of the problem, for the search to compare.
    """
    logging.getLogger("ray.train._internal.storage").setLevel(logging.WARNING)  # five lines a trial, none of them news
    if trains_itself(problem.value):
        own_loop(config, problem.value, seed)
        return
    # Within the limit as well, as the problem's data and model are made here.
    with time_limit(epoch_time_limit):
        training = LowerLevelTraining(problem.value, config, seed)
    restore(training, tune.get_checkpoint(), CHECKPOINT_FILE, load_checkpoint)
    saved, first = training.epoch, True
    while not training.finished:
        last = training.epoch + 1 == problem.value.epochs or problem.value.patience is not None
        # What may be the last epoch of an optimistic problem takes up to as many passes more as there were epochs.
        longer = 1 + problem.value.epochs if last and problem.value.optimistic else 1
        with time_limit(epoch_time_limit and epoch_time_limit * longer):
            training.run_epoch()
            if training.finished:
                training.conclude()
            if not training.reports:
                continue
            metrics = report(training)
        if first:  # Tune's progress.csv has the columns of a trial's first report
            metrics, first = {GRADIENT: training.unknown_gradient, **metrics, PROBLEM: identity}, False
        due = checkpoint_due(training, saved, checkpoint_every)
        saved = training.epoch if due else saved
        send(metrics, CHECKPOINT_FILE, dump_checkpoint(training) if due else None)


def own_loop(config: dict[str, Any], problem: BilevelProblem, seed: int) -> None:
    """What a trial runs where the problem trains itself."""
    begun = None
    if (found := tune.get_checkpoint()) is not None:
        with found.as_directory() as folder:
            if (Path(folder) / CHECKPOINT_FILE).exists():  # its end has been reported already
                return
            begun = (Path(folder) / OWN_FILE).read_bytes()
    training = train_itself(problem, config, seed, lambda metrics, saved: send(metrics, OWN_FILE, saved), begun)
    send(concluded(training), CHECKPOINT_FILE, training.dump())


def concluded(training: OwnTraining) -> dict[str, Any]:
    """The metrics of a training that has ended, by whatever loop."""
    return {**training.losses(), FINISHED: True, GRADIENT: training.gradient(), PASSES: training.passes}


def send(metrics: dict[str, Any], name: str, checkpoint: bytes | None, beside: tune.Checkpoint | None = None) -> None:
    """Report to Tune, with where the trial runs and keeps its files.

    name:   the file of a checkpoint that is due.
    beside: a checkpoint whose files are kept with it.
    """
    # Tune's results name a checkpoint's folder, but not where the trial's own is.
    metrics = {**metrics, TRIAL_PATH: tune.get_context().get_storage().trial_fs_path}
    if gpus := ray.get_gpu_ids():
        metrics[GPUS] = ",".join(map(str, gpus))
    if checkpoint is None:
        tune.report(metrics)
        return
    with tempfile.TemporaryDirectory() as folder:
        if beside is not None:
            beside.to_directory(folder)
        (Path(folder) / name).write_bytes(checkpoint)
        tune.report(metrics, checkpoint=tune.Checkpoint.from_directory(folder))


def restore(training: Any, checkpoint: tune.Checkpoint | None, name: str, load: Callable[[Path], Any]) -> None:
    """Set a training or a descent to the state in its checkpoint, if it has one; `load` reads the file `name`."""
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            training.load_state_dict(load(Path(folder) / name))


def checkpoint_due(training: LowerLevelTraining, saved: int, every: int) -> bool:
    """Whether the present epoch is the last, or the first to be reported in `every` since the one that was saved."""
    return training.finished or training.epoch // every > saved // every


def report(training: LowerLevelTraining) -> dict[str, Any]:
    """The metrics of one epoch; the gradient only where it means something, at the end of the training."""
    metrics: dict[str, Any] = {**training.losses(), EPOCH: training.epoch, FINISHED: training.finished}
    if training.finished:
        metrics[GRADIENT] = training.gradient()
    # Read last, as the gradient is charged.
    return {**metrics, PASSES: training.passes}


def checkpoint_path(result: Mapping[str, Any]) -> str | None:
    """Where a trial's checkpoint of this result lies on the experiment's filesystem."""
    folder, name = result.get(TRIAL_PATH), result.get(CHECKPOINT_DIR_NAME)
    return f"{folder}/{name}" if folder and name else None
