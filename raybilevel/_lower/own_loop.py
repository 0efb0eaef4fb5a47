"""Trainings by a loop of the user's own: what is kept of them, and problems that train themselves."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from raybilevel._lower import checkpoint
from raybilevel._lower.levels import Levels
from raybilevel._lower.observed import Observed
from raybilevel._lower.random_numbers import forked_random
from raybilevel._metrics import EPOCH, FINISHED, PASSES
from raybilevel.errors import ProblemError
from raybilevel.problem import Batch, BilevelProblem, Level, make_model

OWN_FORMAT = 3
OWN_FILE = "own_loop.pt"


class OwnTraining(Observed):
    """A training that has ended, by whatever loop.

    It keeps a copy of the weights in a model that the problem makes of the config, as an upper-level step will.

    trained: passes over the lower-level data with gradients that the loop took.
    time:    for how long each tensor of weights was trained, by its name; None if nobody knows.

    Raises:
        ProblemError: the model that the problem makes of the config has other weights than the one that was trained, or
            the problem is `optimistic`.
    """

    def __init__(self, problem: BilevelProblem, config: Mapping[str, Any], model: nn.Module, trained: float) -> None:
        super().__init__(problem, config)
        if problem.optimistic:
            raise ProblemError(
                f"{type(problem).__name__}.optimistic: a loop of your own does not choose among minimisers of f; "
                "set it to False"
            )
        self.levels = Levels(problem, rebuilt(problem, self.config, model), self.variables, self.config)
        self.trained = trained
        self.time: Mapping[str, Tensor] | None = None

    @property
    def passes(self) -> float:
        return self.trained + self.levels.passes

    def dump(self) -> bytes:
        """A checkpoint that an upper-level step reads as it reads those of our loop."""
        state = {"format": checkpoint.LOWER_LEVEL_FORMAT, "finished": True, "model": self.levels.model.state_dict()}
        return checkpoint.dump(state if self.time is None else {**state, "time": dict(self.time)})


def rebuilt(problem: BilevelProblem, config: Mapping[str, Any], model: nn.Module) -> nn.Module:
    """A model as the problem makes it of the config, with the weights of another one."""
    name = type(problem).__name__
    if not isinstance(model, nn.Module):
        raise ProblemError(f"{name}: expected the trained torch.nn.Module, got {type(model).__name__}")
    # Initial weights draw random numbers, and must not take those of the user's loop.
    with forked_random(problem.device):
        fresh = make_model(problem, config)
    try:
        fresh.load_state_dict(model.state_dict())
    except RuntimeError as error:
        raise ProblemError(
            f"{name}.model() makes another model of the config than the one that was trained; let it ask for the "
            f"hyperparameters, and pass on the bare module, not a wrapper or a compiled one: {error}"
        ) from error
    return fresh


def ignore(metrics: Mapping[str, Any], checkpoint: bytes | None) -> None:
    """Tell nobody."""


def train_itself(
    problem: BilevelProblem,
    config: Mapping[str, Any],
    seed: int,
    tell: Callable[[dict[str, Any], bytes | None], None] = ignore,
    begun: bytes | None = None,
) -> OwnTraining:
    """Let a problem train itself, under the seed.

    Its cost is the last `lower_passes` that it reported; without them what it took of `batches("lower", generator)`, or
    its `epochs` where it took its batches elsewhere.

    tell:  gets what the problem reports, with our own metrics added, and its checkpoint.
    begun: the last checkpoint that `tell` got, if the training was interrupted.

    Raises:
        ProblemError: `train` returned no model, or another one than `model` makes.
        CheckpointError: the checkpoint is damaged.
    """
    own = Reported(problem, config, tell)
    state = None if begun is None else own.restore(begun)
    with forked_random(problem.device):
        torch.manual_seed(seed)
        model = own.counted.train(dict(config), own, state)
    return own.at(model)


class Reported:
    """The `report` of a problem that trains itself, and the count of what it is trained on.

    counted:  a copy of the problem, which counts examples in batches that are taken in random order, as a training
        takes them.
    examples: so many.
    reports:  so far.
    passes:   that it says it took; None while it says nothing.
    time:     for which it says that weights were trained; likewise.
    """

    def __init__(
        self,
        problem: BilevelProblem,
        config: Mapping[str, Any],
        tell: Callable[[dict[str, Any], bytes | None], None],
    ) -> None:
        self.problem, self.config, self.tell = problem, dict(config), tell
        self.examples = self.reports = 0
        self.passes: float | None = None
        self.time: Mapping[str, Tensor] | None = None
        # Shallow, so that the data is shared. The original's `batches` stay uncounted, for evaluations.
        self.counted: Any = copy.copy(problem)
        self.counted.batches = self.batches  # type: ignore[method-assign]

    def __call__(
        self,
        metrics: Mapping[str, Any],
        model: nn.Module | None = None,
        checkpoint: Mapping[str, Any] | None = None,
        trained_time: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.reports += 1
        self.time = self.time if trained_time is None else trained_time
        self.passes = metrics.get(PASSES, self.passes)
        found: dict[str, Any] = {EPOCH: self.reports, **metrics}
        if model is not None:
            training = self.at(model)
            found |= {**training.losses(), PASSES: training.passes}
        self.tell({**found, FINISHED: False}, None if checkpoint is None else self.dump(checkpoint))

    def at(self, model: nn.Module) -> OwnTraining:
        """The training as it would be if it ended with this model."""
        with forked_random(self.problem.device):
            training = OwnTraining(self.problem, self.config, model, float(self.problem.epochs))
            if self.passes is not None:
                training.trained = float(self.passes)
            elif self.examples:
                # Only a pass over the data tells how many examples it has. Without gradients it is free.
                training.levels.value("lower", training.variables.x, training.levels.y)
                training.trained = self.examples / training.levels.examples["lower"]
        if self.time is not None:
            check_times(type(self.problem).__name__, self.time, training.levels.model)
            training.time = self.time
        return training

    def batches(self, level: Level, generator: torch.Generator | None, *args: Any, **kwargs: Any) -> Iterator[Batch]:
        for batch in self.problem.batches(level, generator, *args, **kwargs):
            if level == "lower" and generator is not None:
                self.examples += self.problem.batch_size(batch)
            yield batch

    def dump(self, state: Mapping[str, Any]) -> bytes:
        """Tensors and plain values that a problem wants to find again, and the counts."""
        saved = {
            "format": OWN_FORMAT,
            "state": dict(state),
            "examples": self.examples,
            "reports": self.reports,
            "passes": self.passes,
            "time": None if self.time is None else dict(self.time),
        }
        return checkpoint.dump(saved)

    def restore(self, saved: bytes) -> dict[str, Any]:
        """The problem's own part of it."""
        found = checkpoint.load(saved, "training loop's", OWN_FORMAT)
        self.examples, self.reports = found["examples"], found["reports"]
        self.passes, self.time = found["passes"], found["time"]
        state: dict[str, Any] = found["state"]
        return state


def check_times(problem: str, time: Mapping[str, Tensor], model: nn.Module) -> None:
    """Refuse trained times that are not those of a model's weights.

    Raises:
        ProblemError: a tensor of weights has none, or one of another shape.
    """
    for name, weight in model.named_parameters():
        shape = tuple(time[name].shape) if name in time else None
        if weight.requires_grad and shape not in ((), tuple(weight.shape)):
            raise ProblemError(
                f"{problem}: trained_time needs a tensor of shape () or {tuple(weight.shape)} for the weights {name}, "
                f"got {'nothing' if shape is None else f'shape {shape}'}"
            )
