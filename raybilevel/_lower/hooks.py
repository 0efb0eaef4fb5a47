"""What a problem adds to the loop of a training: a schedule, averaged weights, mixed precision, early stopping."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from raybilevel._lower.mixed_precision import MixedPrecision
from raybilevel._lower.settings import check_settings
from raybilevel._lower.trained_time import TrainedTime
from raybilevel.errors import ProblemError
from raybilevel.problem import BilevelProblem, make_schedule


class Hooks:
    """The hooks of one training, with their state.

    time:  for how long the weights that are kept were trained.
    model: the one that is evaluated, differentiated and kept: the averaged one where the problem averages.
    refit: early stopping is off, as F is then taken on data that the model is trained on.

    Raises:
        ProblemError: a setting of the problem is out of range, or the schedule is of another optimizer, or autocast
            does not go with the optimizer.
    """

    def __init__(
        self, problem: BilevelProblem, model: nn.Module, optimizer: Optimizer, config: Mapping[str, Any], refit: bool
    ) -> None:
        check_settings(problem)
        self.problem, self.raw = problem, model
        self.patience = None if refit else problem.patience
        self.schedule = schedule_of_a_training(problem, optimizer, config)
        self.mixed = MixedPrecision(problem, optimizer)
        self.time = TrainedTime(model, optimizer)
        self.averaged: AveragedModel | None = None
        if problem.ema is not None:
            # Torch copies buffers, e.g. the statistics of batch norm, from the raw model and does not average them.
            self.averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(problem.ema))
        self.model: nn.Module = model if self.averaged is None else self.averaged.module
        self.lowest = math.inf
        self.best: dict[str, Tensor] = {}
        self.best_time: dict[str, Tensor] = {}
        self.waited = 0

    @property
    def stopped(self) -> bool:
        """Whether the training ended early."""
        return self.patience is not None and self.waited >= self.patience

    def after_step(self, clipped: float) -> None:
        """After each step of the optimizer. clipped: what its gradients were multiplied by."""
        self.time.after_step(clipped)  # before the schedule changes the rate
        if self.averaged is not None:
            self.averaged.update_parameters(self.raw)
        if self.schedule is not None and self.problem.schedule_interval == "step":
            self.schedule.step()

    def after_epoch(self, upper: Callable[[], float], evaluated: bool, last: bool) -> None:
        """After each epoch.

        upper:     F at the weights that are kept.
        evaluated: F is taken after this epoch.
        last:      the training ends with this epoch, if it does not end earlier.
        """
        self.time.after_epoch()
        if self.schedule is not None and self.problem.schedule_interval == "epoch":
            if isinstance(self.schedule, ReduceLROnPlateau):
                self.schedule.step(upper())
            else:
                self.schedule.step()
        if self.patience is None or not evaluated:
            return
        found = upper()
        if found < self.lowest:
            self.lowest, self.waited = found, 0
            # A state_dict shares its memory with the model, which is trained on.
            self.best = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
            self.best_time = self.time.state_dict()
        else:
            self.waited += 1
        if last or self.stopped:
            self.model.load_state_dict(self.best)
            self.time.load_state_dict(self.best_time)

    def state_dict(self) -> dict[str, Any]:
        return {
            "schedule": None if self.schedule is None else self.schedule.state_dict(),
            # With 0 the next update would replace the average, and not add to it.
            "averaged": None if self.averaged is None else self.averaged.n_averaged,
            "raw": None if self.averaged is None else self.raw.state_dict(),
            "scaler": self.mixed.scaler.state_dict(),  # empty where it is not enabled
            "lowest": self.lowest,
            "best": self.best,
            "best_time": self.best_time,
            "waited": self.waited,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The model itself is not part of it."""
        if self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"])
        if self.averaged is not None:
            self.averaged.n_averaged.copy_(state["averaged"])
            self.raw.load_state_dict(state["raw"])
        if self.mixed.scaler.is_enabled():
            self.mixed.scaler.load_state_dict(state["scaler"])
        self.lowest, self.best, self.waited = state["lowest"], dict(state["best"]), state["waited"]
        if self.patience is not None:
            self.best_time = dict(state["best_time"])


def schedule_of_a_training(
    problem: BilevelProblem, optimizer: Optimizer, config: Mapping[str, Any]
) -> LRScheduler | None:
    """The learning-rate scheduler of a training, if the problem has one.

    Raises:
        ProblemError: it belongs to another optimizer.
    """
    schedule = make_schedule(problem, optimizer, config)
    if schedule is not None and getattr(schedule, "optimizer", optimizer) is not optimizer:
        raise ProblemError(
            f"{type(problem).__name__}.schedule(optimizer) returned a scheduler of another optimizer, so that it would "
            "change nothing in this training; make a new one for the given optimizer at each call"
        )
    return schedule
