"""Lower-level training: y at fixed hyperparameters x, epoch by epoch. Knows no Ray."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raybilevel._lower import checkpoint
from raybilevel._lower.functions import finite
from raybilevel._lower.levels import Levels
from raybilevel._lower.optimistic import select_minimiser
from raybilevel._lower.passes import Passes
from raybilevel._lower.variables import ConfigVariables
from raybilevel._metrics import LOWER_LOSS, UPPER_LOSS
from raybilevel.errors import NotFiniteError, ProblemError
from raybilevel.problem import Batch, BilevelProblem, evaluate, move
from raybilevel.space import nest

logger = logging.getLogger(__name__)

CHECKPOINT_FILE = "lower_level.pt"
CHECKPOINT_FORMAT = 2


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
) -> None:
    """One step of the optimizer for each batch; every gradient that it asks for is charged.

    batches: as the problem yields them; `loss` gets them on the device.
    where:   in the search this is, for errors.
    number:  a loss as the number that a line search compares.

    Raises:
        NotFiniteError: a loss is NaN or infinite; training on would waste the rest.
    """
    model.train()
    count = 0
    for raw in batches:
        batch, size = move(raw, problem.device, problem.dtype), problem.batch_size(raw)

        def closure(batch: Batch = batch, size: int = size) -> float:
            optimizer.zero_grad()
            found = loss(batch)
            found.backward()
            ledger.charge(size)
            return number(found)

        value = float(optimizer.step(closure))
        if not math.isfinite(value):
            raise NotFiniteError(f"the lower-level loss is {value} {where}")
        count += size
    if not ledger.whole:
        ledger.whole = count


class LowerLevelTraining:
    """A training in progress: model, optimizer, random numbers and epoch.

    It starts cold: the initial weights and the order of the batches come from `seed` alone, the same for every x, so
    that F and v are functions of x and not of chance. There is deliberately no way to start from other weights.
    """

    def __init__(self, problem: BilevelProblem, config: Mapping[str, Any], seed: int = 0, refit: bool = False):
        self.problem, self.config, self.refit = problem, dict(config), refit
        self.variables = ConfigVariables(config, problem)
        self.hyperparameters = self.variables.given(self.variables.x)
        self.epoch = 0
        self.generator = torch.Generator().manual_seed(seed)
        self._random_state: dict[str, Tensor] = {}
        with self._random(seed):
            self.model: nn.Module = problem.model().to(problem.device, problem.dtype)
            self.optimizer = problem.optimizer(self.model)
        self.levels = Levels(problem, self.model, self.variables)

    @property
    def finished(self) -> bool:
        return self.epoch >= self.problem.epochs

    @property
    def reports(self) -> bool:
        """Whether the present epoch is one after which the losses are evaluated and told."""
        return self.finished or self.epoch % self.problem.evaluate_every == 0

    @property
    def passes(self) -> float:
        """What it cost so far, in gradient evaluations of f."""
        return self.levels.passes

    def run_epoch(self) -> None:
        """One pass over the lower-level batches.

        Raises:
            NotFiniteError: the loss is NaN or infinite; training on would waste the rest.
        """
        with self._random():
            train_epoch(
                self.problem, self.model, self.optimizer, self._batches(), self.batch_loss, self.levels.ledger,
                f"in epoch {self.epoch + 1} at {self.config}", self.number,
            )  # fmt: skip
        self.epoch += 1

    def run(self) -> None:
        """All epochs that are left."""
        while not self.finished:
            self.run_epoch()

    def conclude(self) -> None:
        """After the last epoch: of an optimistic problem, choose among the minimisers of f."""
        if self.problem.optimistic:
            select_minimiser(self.levels, self.variables.x, self.passes)

    def batch_loss(self, batch: Batch) -> Tensor:
        """f on a batch that is on the device, to be differentiated."""
        return self.problem.lower_loss(self.model, self.hyperparameters, batch)

    def number(self, loss: Tensor) -> float:
        """The same as a number, which a line search compares."""
        return loss.item()

    def losses(self) -> dict[str, float]:
        """f and F at the present weights, and the problem's own metrics.

        Raises:
            NotFiniteError: f or F is NaN or infinite.
            ProblemError: `evaluate` returned something else than numbers, or one under a reserved name.
        """
        metrics, x, y = self.metrics(), self.variables.x, self.levels.y
        return {
            LOWER_LOSS: finite("lower", self.levels.value("lower", x, y)),
            UPPER_LOSS: finite("upper", self.levels.value("upper", x, y)),
            **metrics,
        }

    def gradient(self) -> dict[str, Any]:
        """df/dx at the present weights, by Danskin's theorem dv/dx; nested as the config is, in the hyperparameters'
        own units. Floats that f does not depend on have gradient 0. An entry that is not finite, as that of a square
        root at 0, is NaN: it is not known. It is charged as one pass.

        Raises:
            NotFiniteError: f is NaN or infinite.
        """
        found = self.levels.lower(self.variables.x, self.levels.y)
        finite("lower", found.value)
        numbers = dict(zip(self.variables.paths, found.in_x.tolist(), strict=True))
        for path, number in numbers.items():
            if not math.isfinite(number):
                logger.warning(
                    "the lower level's gradient in %s is %s at %s; it is left out", "/".join(path), number, self.config
                )
                numbers[path] = math.nan
        return nest(numbers)

    def metrics(self) -> dict[str, float]:
        """What the problem's `evaluate` says of the present weights."""
        self.model.eval()
        with torch.no_grad():
            return evaluate(self.problem, self.model, self.hyperparameters)

    def state_dict(self) -> dict[str, Any]:
        return {
            "format": CHECKPOINT_FORMAT,
            "epoch": self.epoch,
            "finished": self.finished,
            "charged": [self.levels.ledger.examples, self.levels.ledger.whole],
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
        self.epoch = state["epoch"]
        self.levels.ledger.examples, self.levels.ledger.whole = state["charged"]

    def _batches(self) -> Iterator[Batch]:
        if not self.refit:
            return iter(self.problem.batches("lower", self.generator))
        batches = self.problem.refit_batches(self.generator)
        if batches is None:
            raise ProblemError(f"{type(self.problem).__name__} has no refit_batches, so it cannot be refitted")
        return iter(batches)

    @contextmanager
    def _random(self, seed: int | None = None) -> Iterator[None]:
        """Torch's global random numbers (initialisation, dropout) belong to this training inside the block."""
        with forked_random(self.problem.device) as accelerator:
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


@contextmanager
def forked_random(device: str | torch.device) -> Iterator[Any]:
    """Torch's global random numbers, those of the device included, are as before after the block. The accelerator's
    module, e.g. `torch.cuda`; None on the CPU."""
    device = torch.device(device)
    accelerator = None if device.type == "cpu" else torch.get_device_module(device)
    with torch.random.fork_rng(
        devices=[] if accelerator is None else [accelerator.current_device()],
        device_type="cuda" if accelerator is None else device.type,
    ):
        yield accelerator


def train(problem: BilevelProblem, config: Mapping[str, Any], seed: int = 0) -> tuple[TrainedLowerLevel, bytes]:
    """A whole training in this process: what it observed, and its checkpoint."""
    training = LowerLevelTraining(problem, config, seed)
    training.run()
    training.conclude()
    losses, gradient = training.losses(), training.gradient()
    observed = TrainedLowerLevel(losses.pop(LOWER_LOSS), losses.pop(UPPER_LOSS), gradient, training.passes, losses)
    return observed, dump_checkpoint(training)


def refit(problem: BilevelProblem, config: Mapping[str, Any], seed: int = 0) -> dict[str, float] | None:
    """The problem's metrics after a training on training plus validation data; None where it has no such data."""
    if problem.refit_batches(None) is None:
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
    return checkpoint.load(source, "lower-level", CHECKPOINT_FORMAT)
