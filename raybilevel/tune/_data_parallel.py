"""One lower-level training on several processes, each with a GPU of its own: DistributedDataParallel on Ray Train."""

from __future__ import annotations

import copy
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from ray import train, tune
from ray.train.torch import TorchTrainer, get_device
from ray.tune.integration.ray_train import TuneReportCallback
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from raybilevel._cluster.shared import Shared
from raybilevel._cluster.time_limit import time_limit
from raybilevel._lower.functions import LevelGradient
from raybilevel._lower.levels import Levels
from raybilevel._lower.training import CHECKPOINT_FILE, LowerLevelTraining, dump_checkpoint, load_checkpoint
from raybilevel._metrics import FINISHED
from raybilevel.errors import ProblemError
from raybilevel.problem import Batch, BilevelProblem, Level, leaves, make_batches
from raybilevel.tune._trainable import (
    check_arguments,
    check_no_hooks,
    check_not_optimistic,
    checkpoint_due,
    default_checkpoint_interval,
    report,
    restore,
    send,
)

RUN = "data_parallel"


def data_parallel_trainable(
    problem: BilevelProblem,
    scaling: train.ScalingConfig,
    seed: int = 0,
    checkpoint_every: int | None = None,
    epoch_time_limit: float | None = None,
) -> Callable[[dict[str, Any]], None]:
    """`lower_level_trainable` for a model that needs several GPUs: every training runs on the workers of `scaling`.

        trainable = data_parallel_trainable(problem, ScalingConfig(num_workers=4, use_gpu=True))
        search = BilevelSearch(problem, max_concurrent=2)

    Every worker has the whole model, and of each batch of the problem the examples rank, rank + workers, ...; f, F and
    their gradients are those of whole batches, as in a training on one device, up to rounding and to layers that look
    at a batch as a whole, such as batch normalisation. The trial itself holds nothing, so `max_concurrent` has to
    say how many such trainings the cluster holds. An upper-level step still runs on one GPU.

    Raises:
        ProblemError: `problem` is not a `BilevelProblem` instance, is `optimistic`, or sets `accumulate` or `ema`.
        ConfigError: `checkpoint_every` or `epoch_time_limit` is not positive.
    """
    check_arguments("data_parallel_trainable", problem, checkpoint_every, epoch_time_limit)
    check_not_optimistic("data_parallel_trainable", problem)
    check_no_hooks("data_parallel_trainable", problem, "accumulate", "ema")
    every = checkpoint_every or default_checkpoint_interval(problem.epochs)
    given = {"seed": seed, "checkpoint_every": every, "epoch_time_limit": epoch_time_limit}
    trainable: Callable[[dict[str, Any]], None] = tune.with_parameters(
        data_parallel, problem=Shared(problem), scaling=scaling, settings=given
    )
    # The workers hold the resources; of the trial itself Tune wants that it asks for something.
    return tune.with_resources(trainable, {"cpu": 0, "memory": 1})  # type: ignore[no-any-return]


def data_parallel(
    config: dict[str, Any],
    problem: Shared[BilevelProblem],
    scaling: train.ScalingConfig,
    settings: Mapping[str, Any],
) -> None:
    """What a trial runs: it starts the workers, and goes on from the newest checkpoint if it is tried again."""
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    storage = tune.get_context().get_storage()
    trainer = TorchTrainer(
        worker,
        train_loop_config={"config": config, "problem": problem, **settings},
        scaling_config=scaling,
        run_config=train.RunConfig(
            # One name in the trial's folder, by which the trial finds its checkpoints when it is tried again.
            name=RUN,
            storage_path=storage.trial_fs_path,
            storage_filesystem=storage.storage_filesystem,
            callbacks=[AllButTheLast()],
        ),
    )
    result = trainer.fit()
    with result.checkpoint.as_directory() as folder:
        send(result.metrics, CHECKPOINT_FILE, (Path(folder) / CHECKPOINT_FILE).read_bytes())


class AllButTheLast(TuneReportCallback):  # type: ignore[misc]
    """Every epoch to Tune, but for the last one, which the trial reports with its checkpoint."""

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        if not metrics[0][FINISHED]:
            super().after_report(run_context, metrics, None)


def worker(given: Mapping[str, Any]) -> None:
    """What each process of a training runs."""
    device = get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    context = train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    training = DataParallelTraining(given["problem"].value, given["config"], given["seed"], rank, workers)
    restore(training, train.get_checkpoint(), CHECKPOINT_FILE, load_checkpoint)
    saved = training.epoch
    while not training.finished:
        with time_limit(given["epoch_time_limit"]):  # the others of the group wait for a process that hangs
            training.run_epoch()
            if not training.reports:
                continue
            metrics = report(training)
        due = checkpoint_due(training, saved, given["checkpoint_every"])
        saved = training.epoch if due else saved
        with tempfile.TemporaryDirectory() as folder:
            if due and rank == 0:
                (Path(folder) / CHECKPOINT_FILE).write_bytes(dump_checkpoint(training))
            # Every process reports, as Ray Train waits for all of them. One checkpoint is enough: all are alike.
            train.report(metrics, checkpoint=train.Checkpoint.from_directory(folder) if due and rank == 0 else None)


class DataParallelTraining(LowerLevelTraining):
    """A training on this process's share of every batch, in step with the other processes of the group.

    All of them compute the same f, F and gradients: sums over their shares, added up.
    """

    def __init__(
        self, problem: BilevelProblem, config: Mapping[str, Any], seed: int = 0, rank: int = 0, workers: int = 1
    ) -> None:
        self.rank, self.workers = rank, workers
        self.shares = Shares(problem, rank, workers, config)
        own = copy.copy(problem)
        # On a copy: `Shares` splits the batches of the problem itself.
        own.batches = self.shares.batches  # type: ignore[method-assign]
        super().__init__(own, config, seed)
        self.levels = SummedLevels(own, self.model, self.variables, self.config)
        self.parallel = DistributedDataParallel(LowerLoss(problem, self.model))

    def run_epoch(self) -> None:
        super().run_epoch()
        for buffer in self.model.buffers():
            # Statistics of batch norm are of each process's own share. Those of rank 0 are taken by all.
            distributed.broadcast(buffer, 0)

    def batch_loss(self, batch: Batch) -> Tensor:
        """f on this process's share, so weighted that the mean of the processes' gradients is that of the batch."""
        weight = self.workers * self.problem.batch_size(batch) / self.shares.whole
        loss: Tensor = self.parallel(self.hyperparameters, batch)
        return weight * loss

    def number(self, loss: Tensor) -> float:
        """f on the whole batch, as a line search needs it."""
        # The weights of `batch_loss` contain the factor `workers`, by which the sum is divided.
        total = loss.detach().clone()
        distributed.all_reduce(total)
        return total.item() / self.workers

    def metrics(self) -> dict[str, float]:
        # `AllButTheLast` passes on what rank 0 reports.
        return super().metrics() if self.rank == 0 else {}


class LowerLoss(nn.Module):
    """f as a module's output: what is wrapped is the loss, so that the problem's code sees its own model."""

    def __init__(self, problem: BilevelProblem, model: nn.Module) -> None:
        super().__init__()
        self.problem, self.model = problem, model

    def forward(self, hyperparameters: Mapping[str, Any], batch: Batch) -> Tensor:
        return self.problem.lower_loss(self.model, hyperparameters, batch)


class SummedLevels(Levels):
    """Levels of which every process has summed a share."""

    def mean(self, total: float, weights: float, *sums: Tensor) -> LevelGradient:
        # Shares may differ by an example, so the weights are added up as well.
        numbers = torch.tensor([total, weights], dtype=torch.double, device=self.problem.device)
        distributed.all_reduce(numbers)
        for entry in sums:
            distributed.all_reduce(entry)
        return super().mean(numbers[0].item(), numbers[1].item(), *sums)


class Shares:
    """This process's examples of every batch of a problem.

    config: the trial's, for the problem's `batches`.
    whole: examples in the batch that was split last.
    """

    def __init__(self, problem: BilevelProblem, rank: int, workers: int, config: Mapping[str, Any]) -> None:
        self.problem, self.rank, self.workers, self.config = problem, rank, workers, config
        self.whole = 0

    def batches(self, level: Level, generator: torch.Generator | None) -> Iterator[Batch]:
        for batch in make_batches(self.problem, level, generator, self.config):
            self.whole = self.problem.batch_size(batch)
            if self.whole < self.workers or any(len(leaf) != self.whole for leaf in leaves(batch) if leaf.dim()):
                raise ProblemError(
                    f"a batch of {self.whole} examples cannot be split among {self.workers} workers: its tensors need "
                    "that length, and at least one example a worker"
                )
            yield self._own(batch)

    def _own(self, batch: Batch) -> Batch:
        if isinstance(batch, Tensor):
            return batch[self.rank :: self.workers] if batch.dim() else batch
        if isinstance(batch, Mapping):
            return {key: self._own(value) for key, value in batch.items()}
        if isinstance(batch, tuple) and hasattr(batch, "_fields"):
            return type(batch)(*(self._own(value) for value in batch))
        if isinstance(batch, tuple | list):
            return type(batch)(self._own(value) for value in batch)
        return batch
