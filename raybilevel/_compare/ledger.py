"""What a run has seen and spent: one callback and one stopper for every method, so that all are counted alike."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ray.tune import Callback, Stopper

from benchmarks.objective import lowest
from raybilevel._compare.config import Budget
from raybilevel._metrics import EPOCH, FINISHED, GPUS, LOWER_LOSS, PASSES, UPPER_LOSS, problem_metrics
from raybilevel.space import Space, nest


@dataclass
class TrialLog:
    """A trial's life, for the timeline and the curves.

    node, pid, gpus: where it ran last; its GPUs by their numbers, with commas between.
    seconds, uppers, epochs: when each epoch ended since the start of the run, F there, and which epoch it was.
    took: seconds of each epoch.
    """

    trial: str
    status: str = "running"
    node: str = ""
    pid: int = 0
    gpus: str = ""
    seconds: list[float] = field(default_factory=list)
    took: list[float] = field(default_factory=list)
    epochs: list[int] = field(default_factory=list)
    uppers: list[float | None] = field(default_factory=list)
    left: int = 0


@dataclass
class Observed:
    """One ended training.

    status: "done", "stopped" (by a scheduler) or "failed".
    upper, lower: F and f at the trained weights; None unless it ran to its end.
    stopped_upper: F where a scheduler stopped it.
    metrics:      of the problem's `evaluate`.
    passes:       gradient evaluations of f that a whole training took.
    epochs, extra: spent by the run until then: epochs of all trials, gradient evaluations of upper-level steps.
    seconds, gpu_seconds: the same, of the run.
    cost:         in trainings; `spent` in the unit of the budget.
    incumbent:    index of the observation with the lowest F so far.
    """

    trial: str
    status: str
    unit: list[float]
    hyperparameters: dict[str, Any]
    upper: float | None
    lower: float | None
    stopped_upper: float | None
    metrics: dict[str, float]
    passes: float
    epochs: int
    extra: float
    seconds: float
    gpu_seconds: float
    incumbent: int
    cost: float = math.nan
    spent: float = math.nan


class Ledger(Callback):  # type: ignore[misc]
    """Writes down every epoch and every ended training, and what they cost.

    steps: gradient evaluations of upper-level steps so far, and how many are under way; (0, 0) for other methods.
    gpus:  that a trial and an upper-level step hold.
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
        self.observed: list[Observed] = []
        self.epochs = 0
        self.gpu_seconds = 0.0
        self.interrupted = False
        self.on_news: Callable[[Ledger], None] = lambda ledger: None
        self.began = self.seen = time.monotonic()

    # What was spent.

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    @property
    def passes_per_training(self) -> float:
        """Gradient evaluations that a whole training takes on average; infinity before the first."""
        done = [o.passes for o in self.observed if o.status == "done" and o.passes > 0]
        return sum(done) / len(done) if done else math.inf

    def cost(self, epochs: int, extra: float) -> float:
        """In trainings: epochs of trials, and gradient evaluations of upper-level steps."""
        return epochs / self.epochs_per_training + extra / self.passes_per_training

    def spent(self) -> float:
        """In the unit of the budget."""
        if self.budget.unit == "seconds":
            return self.seconds
        if self.budget.unit == "gpu_seconds":
            return self.gpu_seconds
        cost = self.cost(self.epochs, self.steps()[0])
        return cost * self.epochs_per_training if self.budget.unit == "epochs" else cost

    @property
    def over(self) -> bool:
        """Nothing may be spent any more."""
        return self.interrupted or self.spent() >= self.budget.amount - 1e-9

    def room(self) -> bool:
        """Whether another training, with those under way, can run to its end within the budget."""
        left = self.budget.amount - self.spent()
        if self.budget.unit not in ("trainings", "epochs"):
            return left > 0
        trainings = left / (self.epochs_per_training if self.budget.unit == "epochs" else 1)
        running = [t for t in self.trials.values() if t.status == "running"]
        return trainings - sum(t.left for t in running) / self.epochs_per_training >= 1 - 1e-6

    # What Tune tells.

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        now = time.monotonic()
        running = sum(trial.status == "RUNNING" for trial in trials)
        self.gpu_seconds += (now - self.seen) * (running * self.gpus[0] + self.steps()[1] * self.gpus[1])
        self.seen = now
        self.on_news(self)

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        log = self.trials.setdefault(trial.trial_id, TrialLog(trial.trial_id, left=self.epochs_per_training))
        log.status = "running"

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: Mapping[str, Any], **info: Any
    ) -> None:
        if self.over:
            return
        self.epochs += 1
        log = self.trials.setdefault(trial.trial_id, TrialLog(trial.trial_id))
        log.node, log.pid = str(result.get("node_ip", "")), int(result.get("pid", 0))
        log.gpus = str(result.get(GPUS, ""))
        log.seconds.append(round(self.seconds, 3))
        log.took.append(round(float(result.get("time_this_iter_s", 0.0)), 4))
        log.epochs.append(int(result[EPOCH]))
        log.uppers.append(finite(result[UPPER_LOSS]))
        log.left = self.epochs_per_training - int(result[EPOCH])
        if result.get(FINISHED):
            upper, lower = finite(result[UPPER_LOSS]), finite(result[LOWER_LOSS])
            status = "failed" if upper is None or lower is None else "done"
            self._observe(trial, status, upper, lower, None, problem_metrics(result), float(result.get(PASSES, 0.0)))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        log = self.trials.get(trial.trial_id)
        if log is None or log.status != "running":
            return
        if self.over:
            log.status = "cut"
            return
        self._observe(trial, "stopped", None, None, log.uppers[-1] if log.uppers else None, {}, 0.0)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if not self.over:
            self.epochs += 1  # the one in which it failed
            self._observe(trial, "failed", None, None, None, {}, 0.0)

    def _observe(
        self,
        trial: Any,
        status: str,
        upper: float | None,
        lower: float | None,
        stopped_upper: float | None,
        metrics: dict[str, float],
        passes: float,
    ) -> None:
        log = self.trials.setdefault(trial.trial_id, TrialLog(trial.trial_id))
        log.status, log.left = status, 0
        config = searched(self.space, trial.config)
        self.observed.append(
            Observed(
                trial.trial_id,
                status,
                self.space.encode(config).tolist(),
                config,
                upper if status == "done" else None,
                lower if status == "done" else None,
                stopped_upper,
                metrics,
                passes,
                self.epochs,
                self.steps()[0],
                round(self.seconds, 3),
                round(self.gpu_seconds, 3),
                0,
            )
        )
        self.observed[-1].incumbent = self.best

    @property
    def best(self) -> int:
        """Index of the lowest F; 0 before there is one."""
        return lowest(o.upper for o in self.observed)

    def observations(self) -> list[dict[str, Any]]:
        """Everything observed, with its cost: shares of a training are those of the run's average one."""
        for o in self.observed:
            o.cost = round(self.cost(o.epochs, o.extra), 4)
            o.spent = {
                "seconds": o.seconds,
                "gpu_seconds": o.gpu_seconds,
                "epochs": round(o.cost * self.epochs_per_training, 2),
                "trainings": o.cost,
            }[self.budget.unit]
        return [asdict(o) for o in self.observed]


class BudgetStopper(Stopper):  # type: ignore[misc]
    """Ends a run when its budget is spent, and with it the trials under way."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    def __call__(self, trial_id: str, result: Mapping[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self.ledger.over

    def __deepcopy__(self, memo: Any) -> BudgetStopper:
        return self  # Tune copies an experiment's settings for every trial; there is one ledger

    def __getstate__(self) -> dict[str, Any]:
        return {}  # a ledger belongs to one process


def searched(space: Space, config: Mapping[str, Any]) -> dict[str, Any]:
    """The searched hyperparameters of a trial's config, nested."""
    return nest({p.path: space.value(config, p) for p in space.parameters})


def finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
