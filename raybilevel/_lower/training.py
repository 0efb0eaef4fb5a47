"""Lower-level training: y at fixed hyperparameters x, epoch by epoch. Knows no Ray."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raybilevel._lower import checkpoint
from raybilevel._lower.hooks import Hooks
from raybilevel._lower.levels import Levels
from raybilevel._lower.mixed_precision import MixedPrecision
from raybilevel._lower.observed import Observed
from raybilevel._lower.optimistic import select_minimiser
from raybilevel._lower.own_loop import train_itself
from raybilevel._lower.passes import Passes
from raybilevel._lower.random_numbers import forked_random
from raybilevel._metrics import LOWER_LOSS, UPPER_LOSS
from raybilevel.errors import NotFiniteError, ProblemError
from raybilevel.problem import (
    Batch,
    BilevelProblem,
    SupportsAllExamples,
    make_batches,
    make_model,
    make_optimizer,
    make_refit_batches,
    move,
    trains_itself,
)

CHECKPOINT_FILE = "lower_level.pt"


@dataclass(frozen=True)
class TrainedLowerLevel:
    """What one lower-level training observed.

    lower_loss, upper_loss: f and F at the trained weights.
    lower_gradient: df/dx there, by Danskin's theorem dv/dx; nested as the config, in its units.
    passes:         gradient evaluations of f that the training cost, the one for `lower_gradient` included.
    metrics:        what the problem's `evaluate` returned.
    """

    lower_loss: float
    upper_loss: float
    lower_gradient: Mapping[str, Any]
    passes: float
    metrics: Mapping[str, float]


def train_epoch(
    problem: BilevelProblem,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Batch],
    loss: Callable[[Batch], Tensor],
    ledger: Passes,
    where: str,
    number: Callable[[Tensor], float] = Tensor.item,
    after_step: Callable[[float], None] = lambda clipped: None,
    mixed: MixedPrecision | None = None,
) -> None:
    """One step of the optimizer for each batch, or for each few where the problem accumulates; every gradient that it
    asks for is charged.

    batches: as the problem yields them; `loss` gets them on the device.
    where:   in the search this is, for errors.
    number:  a loss as the number that a line search compares.
    after_step: is called after each step, with the factor by which gradients were clipped.
    mixed:   of the training run, whose scaler goes on from epoch to epoch.

    Raises:
        NotFiniteError: a loss is NaN or infinite; training on would waste the rest.
    """
    # `Levels` leaves the model in eval mode after each evaluation.
    model.train()
    count, clipped = 0, 1.0
    mixed = mixed or MixedPrecision(problem, optimizer)
    for group in groups(batches, problem.accumulate):
        parts = [(move(raw, problem.device, problem.dtype), problem.batch_size(raw)) for raw in group]
        total = sum(size for _, size in parts)

        def closure(parts: Sequence[tuple[Batch, int]] = parts, total: int = total) -> float:
            # In here, as L-BFGS calls the closure several times a step.
            nonlocal clipped
            optimizer.zero_grad()
            value = 0.0
            for batch, size in parts:
                # Weighted by examples: a group of batches has the gradient that one large batch would have.
                with mixed.autocast():
                    found = loss(batch) if len(parts) == 1 else loss(batch) * (size / total)
                mixed.scaler.scale(found).backward()
                ledger.charge(size)
                value += number(found)
            mixed.scaler.unscale_(optimizer)
            # After all parts: the limit is one on the gradient of the step.
            if problem.clip is not None:
                norm = nn.utils.clip_grad_norm_(model.parameters(), problem.clip)
                clipped = min(1.0, problem.clip / (norm.item() or 1.0))
            return value

        scaled = mixed.scaler.is_enabled()
        # A scaler takes no closure.
        value = closure() if scaled else loss_of_step(optimizer, closure)
        if not math.isfinite(value):
            raise NotFiniteError(f"the lower-level loss is {value} {where}")
        if not scaled or mixed.step(optimizer):
            after_step(clipped)
        count += total
    # Where no evaluation has counted the examples yet.
    if not ledger.whole:
        ledger.whole = count


def loss_of_step(optimizer: torch.optim.Optimizer, closure: Callable[[], float]) -> float:
    """Take a step. Of the losses of L-BFGS, which takes several, it is the first; NaN if that ends at a NaN."""
    last = 0.0

    def noted() -> float:
        nonlocal last
        last = closure()
        return last

    try:
        return float(optimizer.step(noted))
    except IndexError:
        # Torch's line search has no bracket left if a loss is NaN and its slope is not.
        if math.isnan(last):
            return last
        raise


def groups(batches: Iterable[Batch], count: int) -> Iterator[list[Batch]]:
    """So many batches at a time; the last ones may be fewer."""
    left = iter(batches)
    while group := list(itertools.islice(left, count)):
        yield group


class LowerLevelTraining(Observed):
    """A training in progress: model, optimizer, hooks, random numbers and epoch.

    It starts cold: the initial weights and the order of the batches come from `seed` alone, the same for every x, so
    that F and v are functions of x and not of chance. There is deliberately no way to start from other weights.
    """

    def __init__(self, problem: BilevelProblem, config: Mapping[str, Any], seed: int = 0, refit: bool = False):
        super().__init__(problem, config)
        self.refit, self.epoch = refit, 0
        # Batches have their own numbers: a model with more weights or dropout sees them in the same order.
        self.generator = torch.Generator().manual_seed(seed)
        self._random_state: dict[str, Tensor] = {}
        with self._random(seed):
            self.model = make_model(problem, self.config)
            self.optimizer = make_optimizer(problem, self.model, self.config)
            self.hooks = Hooks(problem, self.model, self.optimizer, self.config, refit)
        # With averaged weights F, f and df/dx are those of the average.
        self.levels = Levels(problem, self.hooks.model, self.variables, self.config)

    @property
    def finished(self) -> bool:
        return self.epoch >= self.problem.epochs or self.hooks.stopped

    @property
    def reports(self) -> bool:
        """Whether the present epoch is one after which the losses are evaluated and told."""
        return self.finished or self.epoch % self.problem.evaluate_every == 0

    def run_epoch(self) -> None:
        """One pass over the lower-level batches.

        Raises:
            NotFiniteError: the loss is NaN or infinite; training on would waste the rest.
        """
        with self._random():
            train_epoch(
                self.problem, self.model, self.optimizer, self._batches(), self.batch_loss, self.levels.ledger,
                f"in epoch {self.epoch + 1} at {self.config}", self.number, self.hooks.after_step,
                self.hooks.mixed,
            )  # fmt: skip
        self.epoch += 1
        # After the count: `reports` and `finished` are asked about the epoch that has just ended.
        self.hooks.after_epoch(self.upper, self.reports, self.finished)

    def run(self) -> None:
        """All epochs that are left."""
        while not self.finished:
            self.run_epoch()

    def conclude(self) -> None:
        """After the last epoch: of an optimistic problem, choose among the minimisers of f."""
        if self.problem.optimistic:
            # As many passes as the training took, so that it costs up to twice as much (`BilevelProblem.optimistic`).
            select_minimiser(self.levels, self.variables.x, self.passes)

    def batch_loss(self, batch: Batch) -> Tensor:
        """f on a batch that is on the device, to be differentiated."""
        return self.problem.lower_loss(self.model, self.hyperparameters, batch)

    def number(self, loss: Tensor) -> float:
        """The same as a number, which a line search compares."""
        return loss.item()

    def state_dict(self) -> dict[str, Any]:
        return {
            "format": checkpoint.LOWER_LEVEL_FORMAT,
            "epoch": self.epoch,
            "finished": self.finished,
            "charged": [self.levels.ledger.examples, self.levels.ledger.whole],
            "model": self.hooks.model.state_dict(),
            "hooks": self.hooks.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "time": self.hooks.time.state_dict(),
            "generator": self.generator.get_state(),
            "random": self._random_state,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        # Without averaged weights this is the trained model itself. With them `hooks` has the raw one.
        self.hooks.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.hooks.time.load_state_dict(state["time"])
        self.hooks.load_state_dict(state["hooks"])
        self.generator.set_state(state["generator"])
        self._random_state = dict(state["random"])
        self.epoch = state["epoch"]
        self.levels.ledger.examples, self.levels.ledger.whole = state["charged"]

    def _batches(self) -> Iterator[Batch]:
        if not self.refit:
            return iter(make_batches(self.problem, "lower", self.generator, self.config))
        batches = make_refit_batches(self.problem, self.generator, self.config)
        if batches is None:
            raise ProblemError(f"{type(self.problem).__name__} has no refit_batches, so it cannot be refitted")
        return iter(batches)

    @contextmanager
    def _random(self, seed: int | None = None) -> Iterator[None]:
        """Torch's global random numbers (initialisation, dropout) belong to this training inside the block."""
        with forked_random(self.problem.device) as accelerator:
            if seed is not None:
                # This seeds accelerators as well.
                torch.manual_seed(seed)
            else:
                torch.set_rng_state(self._random_state["cpu"])
                if accelerator is not None:
                    accelerator.set_rng_state(self._random_state["accelerator"])
            yield
            # Inside `forked_random`, which puts the caller's numbers back.
            self._random_state = {"cpu": torch.get_rng_state()}
            if accelerator is not None:
                self._random_state["accelerator"] = accelerator.get_rng_state()


def train(problem: BilevelProblem, config: Mapping[str, Any], seed: int = 0) -> tuple[TrainedLowerLevel, bytes]:
    """A whole training in this process: what it observed, and its checkpoint."""
    if trains_itself(problem):
        own = train_itself(problem, config, seed)
        return observed(own), own.dump()
    training = LowerLevelTraining(problem, config, seed)
    training.run()
    training.conclude()
    return observed(training), dump_checkpoint(training)


def observed(training: Observed) -> TrainedLowerLevel:
    """What a training observes at its end."""
    # `passes` is read after the gradient, which is charged.
    losses, gradient = training.losses(), training.gradient()
    return TrainedLowerLevel(losses.pop(LOWER_LOSS), losses.pop(UPPER_LOSS), gradient, training.passes, losses)


def refit(problem: BilevelProblem, config: Mapping[str, Any], seed: int = 0) -> dict[str, float] | None:
    """The problem's metrics after a training on training plus validation data (`refit_batches`), in this process.

    config: hyperparameters and constants, nested, e.g. `results.get_best_result().config`.

    Returns:
        None if the problem has no `refit_batches` and no folds, or trains itself.
    """
    if isinstance(problem, SupportsAllExamples):
        training = LowerLevelTraining(problem.on_all_examples(), config, seed)
        training.run()
        return training.metrics()
    if trains_itself(problem) or make_refit_batches(problem, None, config) is None:
        return None
    training = LowerLevelTraining(problem, config, seed, refit=True)
    training.run()
    return training.metrics()


def dump_checkpoint(training: LowerLevelTraining) -> bytes:
    return checkpoint.dump(training.state_dict())


def load_checkpoint(source: bytes | Path) -> dict[str, Any]:
    """The state of a training from its checkpoint, on the CPU; never runs code from it.

    Raises:
        CheckpointError: it is missing, damaged, or of another format version.
    """
    return checkpoint.load(source, "lower-level", checkpoint.LOWER_LEVEL_FORMAT)
