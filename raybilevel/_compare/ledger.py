"""Results and costs of a run, from one callback and one stopper, so that every method is charged in the same way."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

from ray.tune import Callback, Stopper

from raybilevel._compare.config import Budget
from raybilevel._metrics import EPOCH, FINISHED, GPUS, LOWER_LOSS, PASSES, UPPER_LOSS, problem_metrics
from raybilevel._records.incumbents import lowest
from raybilevel._records.record import Observation, Spent, TrainingStatus, TrialLog
from raybilevel._tree import MISSING, leaves, look_up, replaced
from raybilevel.space import Space


class Ledger(Callback):  # type: ignore[misc]
    """Logs every epoch and every ended training, with their costs.

    steps: returns the gradient evaluations of upper-level steps so far, and the number of steps under way. Other
        methods have (0, 0).
    gpus:  GPUs of a trial and of an upper-level step.
    """

    def __init__(
        self,
        space: Space,
        epochs: int,
        budget: Budget,
        gpus: tuple[float, float] = (0.0, 0.0),
        steps: Callable[[], tuple[float, int]] = lambda: (0.0, 0),
    ) -> None:
        self.space, self.epochs_per_training, self.budget = space, epochs, budget
        self.gpus, self.steps = gpus, steps
        self.trials: dict[str, TrialLog] = {}
        self.observed: list[Observation] = []
        self.epochs = 0
        self.gpu_seconds = 0.0
        self.interrupted = False
        self.on_news: Callable[[Ledger], None] = lambda ledger: None
        self.began = self.seen = time.monotonic()

    # Costs.

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    @property
    def passes_per_training(self) -> float:
        """Mean gradient evaluations of a completed training; infinity before the first."""
        done = [o.passes for o in self.observed if o.status == "done" and o.passes > 0]
        # Infinity, by which the passes are divided: steps before the first completed training are charged later.
        return sum(done) / len(done) if done else math.inf

    def cost(self, epochs: int, extra_passes: float) -> float:
        """The cost in trainings, of epochs of trials and gradient evaluations of upper-level steps."""
        return epochs / self.epochs_per_training + extra_passes / self.passes_per_training

    def spent(self) -> float:
        """The cost so far, in the unit of the budget."""
        if self.budget.unit == "seconds":
            return self.seconds
        if self.budget.unit == "gpu_seconds":
            return self.gpu_seconds
        cost = self.cost(self.epochs, self.steps()[0])
        return cost * self.epochs_per_training if self.budget.unit == "epochs" else cost

    @property
    def over(self) -> bool:
        """Whether the run is to end."""
        return self.interrupted or self.spent() >= self.budget.amount - 1e-9

    def room(self) -> bool:
        """Whether the budget suffices for the trainings under way and one more."""
        left = self.budget.amount - self.spent()
        if self.budget.unit not in ("trainings", "epochs"):
            return left > 0  # the time of a training is not known beforehand
        trainings = left / (self.epochs_per_training if self.budget.unit == "epochs" else 1)
        left_of_running = sum(self._epochs_left(t) for t in self.trials.values() if t.status == "running")
        return trainings - left_of_running / self.epochs_per_training >= 1 - 1e-6

    def _epochs_left(self, log: TrialLog) -> int:
        return self.epochs_per_training - (log.epochs[-1] if log.epochs else 0)

    # Tune's callbacks.

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        now = time.monotonic()
        running = sum(trial.status == "RUNNING" for trial in trials)
        # What runs now is taken to have run since the last step of Tune's loop.
        self.gpu_seconds += (now - self.seen) * (running * self.gpus[0] + self.steps()[1] * self.gpus[1])
        self.seen = now
        self.on_news(self)

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._log(trial, status="running")

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: Mapping[str, Any], **info: Any
    ) -> None:
        if self.over:  # a result after the budget was spent must not count, for any method
            return
        log, upper_loss, lower_loss = self._log(trial), finite(result[UPPER_LOSS]), finite(result[LOWER_LOSS])
        # A problem may report less often than each epoch. After a retry epochs are reported again, one at a time.
        self.epochs += max(1, int(result[EPOCH]) - (log.epochs[-1] if log.epochs else 0))
        self._log(
            trial,
            node=str(result.get("node_ip", "")),
            pid=int(result.get("pid", 0)),
            gpus=str(result.get(GPUS, "")),
            seconds=(*log.seconds, round(self.seconds, 3)),
            took=(*log.took, round(float(result.get("time_this_iter_s", 0.0)), 4)),
            epochs=(*log.epochs, int(result[EPOCH])),
            upper_losses=(*log.upper_losses, upper_loss),
        )
        if result.get(FINISHED):
            metrics, passes = problem_metrics(result), float(result.get(PASSES, 0.0))
            if upper_loss is None or lower_loss is None:
                self._observe(trial, "failed", metrics=metrics, passes=passes)
            else:
                self._observe(
                    trial, "done", upper_loss=upper_loss, lower_loss=lower_loss, metrics=metrics, passes=passes
                )

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        log = self.trials.get(trial.trial_id)
        # Its end was noted with its last result already.
        if log is None or log.status != "running":
            return
        if self.over:
            self._log(trial, status="cut")
            return
        self._observe(trial, "stopped", stopped_upper_loss=log.upper_losses[-1] if log.upper_losses else None)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if not self.over:
            self.epochs += 1  # of the epoch in which it failed nothing was reported
            self._observe(trial, "failed")

    def _log(self, trial: Any, **changes: Any) -> TrialLog:
        """Update a trial's log, and return it."""
        log = self.trials.get(trial.trial_id, TrialLog(trial=trial.trial_id)).model_copy(update=changes)
        self.trials[trial.trial_id] = log
        return log

    def _observe(self, trial: Any, status: TrainingStatus, **seen: Any) -> None:
        """Note that a training has ended. Its cost in trainings is known only at the end of the run."""
        self._log(trial, status=status)
        losses = [*(o.upper_loss for o in self.observed), seen.get("upper_loss")]
        self.observed.append(
            Observation(
                trial=trial.trial_id,
                status=status,
                unit=tuple(self.space.encode(trial.config).tolist()),
                hyperparameters=searched(self.space, trial.config),
                epochs=self.epochs,
                extra_passes=self.steps()[0],
                seconds=round(self.seconds, 3),
                gpu_seconds=round(self.gpu_seconds, 3),
                incumbent=lowest(losses),
                **seen,
            )
        )

    @property
    def best(self) -> Observation | None:
        """The training with the lowest F; None before the first completed training."""
        index = lowest(o.upper_loss for o in self.observed)
        return self.observed[index] if self.observed and self.observed[index].upper_loss is not None else None

    def observations(self) -> tuple[Observation, ...]:
        """All observations, with their costs. A fraction of a training is relative to the mean one of the whole run."""
        return tuple(self._with_cost(observed) for observed in self.observed)

    def _with_cost(self, observed: Observation) -> Observation:
        cost = round(self.cost(observed.epochs, observed.extra_passes), 4)
        spent = {
            "seconds": observed.seconds,
            "gpu_seconds": observed.gpu_seconds,
            "epochs": round(cost * self.epochs_per_training, 2),
            "trainings": cost,
        }[self.budget.unit]
        return observed.model_copy(update={"cost": cost, "spent": spent})

    @property
    def total(self) -> Spent:
        return Spent(epochs=self.epochs, gpu_seconds=round(self.gpu_seconds, 3))


class BudgetStopper(Stopper):  # type: ignore[misc]
    """Stops a run, and its trials under way, when the budget is spent."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    def __call__(self, trial_id: str, result: Mapping[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self.ledger.over

    def __deepcopy__(self, memo: Any) -> BudgetStopper:
        return self  # Tune copies an experiment's settings for every trial, but there is one ledger

    def __getstate__(self) -> dict[str, Any]:
        return {}  # a ledger belongs to one process


def searched(space: Space, config: Mapping[str, Any]) -> dict[str, Any]:
    """What a trial's config has of a space: the active hyperparameters, with the constants beside them in lists and
    alternatives."""
    shape = space.to_config(space.encode(config))
    # Values as the trial had them: those of a coordinate may differ in the last digit.
    had = {path: look_up(config, path) for path in leaves(shape) if path}
    found: dict[str, Any] = replaced(shape, {path: value for path, value in had.items() if value is not MISSING})
    return found


def finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
