"""The record of one run: its settings, its machine and every training.

Records come from comparisons (`raybilevel compare`), from the benchmark, and from reading a folder of `raybilevel run`.
All have this one schema. Tables and figures are made from records alone.
"""

from __future__ import annotations

import math
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from raybilevel._lower.paired import Gain
from raybilevel._metrics import UPPER_LOSS
from raybilevel.search_state import Shrinkage
from raybilevel.space import Space

FORMAT: Final = 2
"""Format 1 was plain mappings whose keys depended on the program that wrote them."""

Kind = Literal["benchmark", "comparison", "run"]
RunStatus = Literal["running", "done", "failed", "interrupted", "unavailable"]
TrainingStatus = Literal["done", "stopped", "failed"]
Unit = Literal["trainings", "epochs", "seconds", "gpu_seconds"]


class Stored(BaseModel):
    """A value that is stored with the names of its fields. An unknown name in the file is an error."""

    # JSON has neither NaN nor infinity.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Settings(Stored):
    """Everything that decides the result of a run.

    space, resources: as in a config. None if the problem's own space is searched, or if all runs in one process.
    budget:           in `budget_unit`.
    slots:            concurrent trainings and upper-level steps on the simulated clock of the benchmark.
    """

    problem: str
    options: dict[str, Any]
    method: str
    method_settings: dict[str, Any] = {}
    space: dict[str, Any] | None = None
    resources: dict[str, Any] | None = None
    seed: int
    budget: float
    budget_unit: Unit = "trainings"
    slots: int = 1


class Hyperparameter(Stored):
    """One dimension of the box."""

    name: str
    low: float
    high: float
    log: bool


class Observation(Stored):
    """One training that has ended.

    trial:        the identifier of its trial; empty if no trial ran.
    number:       of the training, as in the names of Tune's trials; None where none was counted.
    status:       "stopped" is by a scheduler.
    unit:         its point in the unit cube, shape (d,).
    upper_loss, lower_loss: F and f at the trained weights; None unless the training completed.
    stopped_upper_loss: F when a scheduler stopped it.
    metrics:      from the problem's `evaluate`.
    feasible:     whether they keep the constraints; None where F is not known or there are no constraints.
    passes:       gradient evaluations of f in the training.
    epochs, extra_passes, seconds, gpu_seconds: totals of the run when the training ended: epochs of all trainings,
        gradient evaluations of f outside of trainings, wall-clock seconds, and GPUs held times seconds.
    cost, spent:  the same total in trainings, and in the unit of the budget.
    incumbent:    position of the training that the method would return now. In the record of a run it is the one
        with the lowest F so far, except with the last training of a run that has ended.
    trace:        notes of a benchmark's method about the point.
    """

    trial: str = ""
    number: int | None = None
    status: TrainingStatus
    unit: tuple[float, ...]
    hyperparameters: dict[str, Any]
    upper_loss: float | None = None
    lower_loss: float | None = None
    stopped_upper_loss: float | None = None
    metrics: dict[str, float] = {}
    feasible: bool | None = None
    passes: float = 0.0
    epochs: int = 0
    extra_passes: float = 0.0
    seconds: float = 0.0
    gpu_seconds: float = 0.0
    cost: float = 0.0
    spent: float = 0.0
    incumbent: int = 0
    trace: dict[str, Any] = {}


class TrialLog(Stored):
    """The log of a trial, epoch by epoch.

    status:          "cut" if the end of the run stopped it.
    node, pid, gpus: where it ran last. GPUs are numbers with commas between.
    seconds, took:   the end of each epoch in seconds since the start of the run, and its duration in seconds.
    epochs, upper_losses: the number of each epoch, and F after it.
    """

    trial: str
    status: TrainingStatus | Literal["running", "cut", "lost", "unknown"] = "running"
    node: str = ""
    pid: int = 0
    gpus: str = ""
    seconds: tuple[float, ...] = ()
    took: tuple[float, ...] = ()
    epochs: tuple[int, ...] = ()
    upper_losses: tuple[float | None, ...] = ()


class Step(Stored):
    """One upper-level step; a field is None where what ran it does not tell it.

    began, ended: seconds since the start of the run.
    targets:      trainings whose hypergradients it took, which are in `hypergradients`.
    shrinkage:    what it learned of groups of hyperparameters.
    """

    number: int
    began: float | None = None
    ended: float | None = None
    origin: str | None = None
    centre: int | None = None
    targets: tuple[int, ...] = ()
    radius: float | None = None
    passes: float | None = None
    multiplier: float | None = None
    violation: float | None = None
    decrease: float | None = None
    hypergradients: dict[int, tuple[float, ...]] = {}
    shrinkage: Shrinkage | None = None


class Overhead(Stored):
    """The cost of a method apart from trainings.

    calls, suggest_seconds, suggest_cpu_seconds: of its searcher, in the driver.
    upper_seconds, upper_passes: of upper-level steps; None for methods without them.
    """

    calls: int = 0
    suggest_seconds: float = 0.0
    suggest_cpu_seconds: float = 0.0
    upper_seconds: float | None = None
    upper_passes: float | None = None


class Machine(Stored):
    """The cluster of a run, without host names."""

    system: str
    nodes: int
    cpus: float
    gpus: float
    accelerators: tuple[str, ...]
    memory_gib: float


class Spent(Stored):
    """Totals of the whole run."""

    epochs: int = 0
    gpu_seconds: float = 0.0


class Record(Stored):
    """One run of one method on one problem with one seed.

    problem_name, method_name: their names in the config.
    marks:      costs at which tables report.
    optimum:    the lowest possible F, if it is known.
    versions:   of packages, and of the algorithm's code ("core"); None for a package that is not installed.
    exhausted:  whether the method had nothing more to try before its budget was spent.
    refits:     metrics after a training on all data, by the position of the training with the same hyperparameters.
    retrained:  F and metrics of trainings with the same hyperparameters under other seeds, by that position.
    search:     the content of the state file, for raybilevel's own methods; see `search_of`.
    metric:     what was optimised.
    gain:       of the result over the start, by single examples; None where it is not known.
    shared, gain_over_shared: position of the best training with one value for all hyperparameters of a kind, and the
        gain of the result over it.
    verdict, diagnostics, in_words: as in the summary of a run.
    """

    format: Literal[2] = FORMAT
    kind: Kind
    status: RunStatus
    error: str | None = None
    traceback: str | None = None
    problem_name: str
    method_name: str
    metric: str = UPPER_LOSS
    settings: Settings
    epochs_per_training: int = Field(ge=1)
    space: tuple[Hyperparameter, ...]
    marks: tuple[float, ...] = ()
    optimum: float | None = None
    versions: dict[str, str | None] = {}
    machine: Machine | None = None
    exhausted: bool = False
    seconds: float = 0.0
    spent: Spent = Spent()
    observations: tuple[Observation, ...] = ()
    trials: tuple[TrialLog, ...] = ()
    steps: tuple[Step, ...] = ()
    refits: dict[int, dict[str, float]] = {}
    retrained: dict[int, tuple[dict[str, float], ...]] = {}
    overhead: Overhead | None = None
    search: dict[str, Any] | None = None
    verdict: str | None = None
    diagnostics: dict[str, float | None] = {}
    in_words: tuple[str, ...] = ()
    gain: Gain | None = None
    shared: int | None = None
    gain_over_shared: Gain | None = None

    @property
    def lowest(self) -> float | None:
        """The lowest F of a completed training; None without one."""
        return min((o.upper_loss for o in self.observations if o.upper_loss is not None), default=None)

    @property
    def start(self) -> int | None:
        """Position of the first training that was asked, of those that ran to their end."""
        done = [i for i, o in enumerate(self.observations) if o.upper_loss is not None]
        # Points whose F is known from elsewhere have the number 0.
        return min(done, key=lambda i: self.number_of(i) or math.inf, default=None)

    @property
    def objective(self) -> tuple[float, str]:
        """The sign that makes F of the record the metric as it was reported, and the metric's own name."""
        return (-1.0, self.metric[1:]) if self.metric.startswith("-") else (1.0, self.metric)

    def number_of(self, position: int) -> int:
        """Of the training at a position, as it is shown."""
        number = self.observations[position].number
        return position + 1 if number is None else number


def box(space: Space) -> tuple[Hyperparameter, ...]:
    """A space in the form of a record."""
    return tuple(Hyperparameter(name=p.name, low=p.low, high=p.high, log=p.log) for p in space.parameters)
