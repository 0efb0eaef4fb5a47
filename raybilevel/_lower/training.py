"""Lower-level training: y at fixed hyperparameters x, epoch by epoch. Knows no Ray."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raybilevel._lower import checkpoint
from raybilevel._lower.levels import Levels, as_tensors, lower_gradient
from raybilevel._lower.optimistic import select_minimiser
from raybilevel._metrics import LOWER_LOSS, UPPER_LOSS
from raybilevel.errors import NotFiniteError, ProblemError
from raybilevel.problem import BilevelProblem, evaluate

CHECKPOINT_FILE = "lower_level.pt"
CHECKPOINT_FORMAT = 1


@dataclass(frozen=True)
class TrainedLowerLevel:
    """What one lower-level training observed.

    lower_loss, upper_loss: f and F at the trained weights.
    lower_gradient: df/dx there, by Danskin's theorem dv/dx; nested as the config, in its units.
    passes:         gradient evaluations of f that the training cost.
    metrics:        what the problem's `evaluate` returned.
    """

    lower_loss: float
    upper_loss: float
    lower_gradient: Mapping[str, Any]
    passes: float
    metrics: Mapping[str, float]


class LowerLevelTraining:
    """A training in progress: model, optimizer, random numbers and epoch.

    It starts cold: the initial weights and the order of the batches come from `seed` alone, the same for every x, so
    that F and v are functions of x and not of chance. There is deliberately no way to start from other weights.
    """

    def __init__(self, problem: BilevelProblem, config: Mapping[str, Any], seed: int = 0, refit: bool = False):
        self.problem, self.config, self.refit = problem, dict(config), refit
        self.hyperparameters = as_tensors(config, problem)
        self.epoch = 0
        self.generator = torch.Generator().manual_seed(seed)
        self._random_state: dict[str, Tensor] = {}
        with self._random(seed):
            self.model: nn.Module = problem.model().to(problem.device, problem.dtype)
            self.optimizer = problem.optimizer(self.model)
        self.levels = Levels(problem, self.model)

    @property
    def finished(self) -> bool:
        return self.epoch >= self.problem.epochs

    def run_epoch(self) -> None:
        """One pass over the lower-level batches.

        Raises:
            NotFiniteError: the loss is NaN or infinite; training on would waste the rest.
        """
        with self._random():
            self.model.train()
            for raw in self._batches():
                batch, size = self.levels.on_device(raw), self.problem.batch_size(raw)

                def closure(batch: Any = batch, size: int = size) -> float:
                    self.optimizer.zero_grad()
                    loss = self.batch_loss(batch)
                    loss.backward()
                    self.levels.examples += size
                    return self.number(loss)

                loss = float(self.optimizer.step(closure))
                if not math.isfinite(loss):
                    raise NotFiniteError(f"the lower-level loss is {loss} in epoch {self.epoch + 1} at {self.config}")
        self.epoch += 1

    def conclude(self) -> None:
        """After the last epoch: of an optimistic problem, choose among the minimisers of f."""
        if self.problem.optimistic:
            select_minimiser(self.levels, self.hyperparameters, self.levels.passes)

    def batch_loss(self, batch: Any) -> Tensor:
        """f on a batch that is on the device, to be differentiated."""
        return self.levels.batch_loss("lower", self.hyperparameters, batch)

    def number(self, loss: Tensor) -> float:
        """The same as a number, which a line search compares."""
        return loss.item()

    def losses(self) -> dict[str, float]:
        """f and F at the present weights, and the problem's own metrics.

        Raises:
            ProblemError: `evaluate` returned something else than numbers, or one under a reserved name.
        """
        metrics = self._evaluate()
        return {
            LOWER_LOSS: self.levels.value("lower", self.hyperparameters),
            UPPER_LOSS: self.levels.value("upper", self.hyperparameters),
            **metrics,
        }

    def gradient(self) -> dict[str, Any]:
        """df/dx at the present weights, nested as the config is."""
        return lower_gradient(self.levels, self.config)

    def state_dict(self) -> dict[str, Any]:
        return {
            "format": CHECKPOINT_FORMAT,
            "epoch": self.epoch,
            "finished": self.finished,
            "examples": self.levels.examples,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "random": self._random_state,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self._random_state = dict(state["random"])
        self.epoch, self.levels.examples = state["epoch"], state["examples"]

    def _batches(self) -> Iterator[Any]:
        if not self.refit:
            return iter(self.problem.batches("lower", self.generator))
        batches = self.problem.refit_batches(self.generator)
        if batches is None:
            raise ProblemError(f"{type(self.problem).__name__} has no refit_batches, so it cannot be refitted")
        return iter(batches)

    def _evaluate(self) -> dict[str, float]:
        self.model.eval()
        with torch.no_grad():
            return evaluate(self.problem, self.model, self.hyperparameters)

    @contextmanager
    def _random(self, seed: int | None = None) -> Iterator[None]:
        """Torch's global random numbers (initialisation, dropout) belong to this training inside the block."""
        device = torch.device(self.problem.device)
        accelerator = None if device.type == "cpu" else torch.get_device_module(device)
        with torch.random.fork_rng(
            devices=[] if accelerator is None else [accelerator.current_device()],
            device_type="cuda" if accelerator is None else device.type,
        ):
            if seed is not None:
                torch.manual_seed(seed)
            else:
                torch.set_rng_state(self._random_state["cpu"])
                if accelerator is not None:
                    accelerator.set_rng_state(self._random_state["accelerator"])
            yield
            self._random_state = {"cpu": torch.get_rng_state()}
            if accelerator is not None:
                self._random_state["accelerator"] = accelerator.get_rng_state()


def train(problem: BilevelProblem, config: Mapping[str, Any], seed: int = 0) -> tuple[TrainedLowerLevel, bytes]:
    """A whole training in this process: what it observed, and its checkpoint."""
    training = LowerLevelTraining(problem, config, seed)
    while not training.finished:
        training.run_epoch()
    training.conclude()
    passes = training.levels.passes
    losses = training.losses()
    observed = TrainedLowerLevel(losses.pop(LOWER_LOSS), losses.pop(UPPER_LOSS), training.gradient(), passes, losses)
    return observed, dump_checkpoint(training)


def refit(problem: BilevelProblem, config: Mapping[str, Any], seed: int = 0) -> dict[str, float] | None:
    """The problem's metrics after a training on training plus validation data; None where it has no such data."""
    if problem.refit_batches(None) is None:
        return None
    training = LowerLevelTraining(problem, config, seed, refit=True)
    while not training.finished:
        training.run_epoch()
    return training._evaluate()


def dump_checkpoint(training: LowerLevelTraining) -> bytes:
    return checkpoint.dump(training.state_dict())


def load_checkpoint(source: bytes | Path) -> dict[str, Any]:
    """The state of a training from its checkpoint, on the CPU; never runs code from it.

    Raises:
        CheckpointError: it is missing, damaged, or of another format version.
    """
    return checkpoint.load(source, "lower-level", CHECKPOINT_FORMAT)
