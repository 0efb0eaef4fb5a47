"""The record of one run: what was set, what it ran on, and every training. The same for all that make one.

Records come from comparisons (`raybilevel compare`), from the benchmark, and from a folder of `raybilevel run` that is
read back. Tables and figures are made from records alone.
"""

from __future__ import annotations

from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from raybilevel.search_state import Shrinkage
from raybilevel.space import Space

FORMAT: Final = 2
"""1: plain mappings whose keys depended on what made them."""

Kind = Literal["benchmark", "comparison", "run"]
RunStatus = Literal["running", "done", "failed", "interrupted", "unavailable"]
TrainingStatus = Literal["done", "stopped", "failed"]
Unit = Literal["trainings", "epochs", "seconds", "gpu_seconds"]


class Stored(BaseModel):
    """A value that is written with its names; another name in the file is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Settings(Stored):
    """What decides the result of a run.

    space, resources: as in a config; None where they are the problem's own, or the run's process.
    budget:           in `budget_unit`.
    slots:            trainings and upper-level steps at once, on the benchmark's simulated clock.
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

    trial:        Tune's name of it; empty where no trial ran.
    status:       "stopped" by a scheduler.
    unit:         where, in the unit cube, shape (d,).
    upper_loss, lower_loss: F and f at the trained weights; None unless it ran to its end.
    stopped_upper_loss: F where a scheduler stopped it.
    metrics:      of the problem's `evaluate`.
    passes:       gradient evaluations of f in the training.
    epochs, extra_passes, seconds, gpu_seconds: spent by the run when the training ended: epochs of all trainings,
        gradient evaluations of f outside of trainings, wall-clock, GPUs held times how long.
    cost:         the same in trainings; `spent` in the unit of the budget.
    incumbent:    position of the training that the method would return now.
    trace:        what a method of the benchmark says about the point.
    """

    trial: str = ""
    status: TrainingStatus
    unit: tuple[float, ...]
    hyperparameters: dict[str, Any]
    upper_loss: float | None = None
    lower_loss: float | None = None
    stopped_upper_loss: float | None = None
    metrics: dict[str, float] = {}
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
    """A trial's life, epoch by epoch.

    status:          "cut" where the end of the run ended it.
    node, pid, gpus: where it ran last; its GPUs by their numbers, with commas between.
    seconds, took:   when each epoch ended since the start of the run, and how long it took.
    epochs, upper_losses: which epoch it was, and F there.
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
    """What a method took beside trainings.

    calls, suggest_seconds, suggest_cpu_seconds: within its searcher, in the driver.
    upper_seconds, upper_passes: of upper-level steps; None for methods without them.
    """

    calls: int = 0
    suggest_seconds: float = 0.0
    suggest_cpu_seconds: float = 0.0
    upper_seconds: float | None = None
    upper_passes: float | None = None


class Machine(Stored):
    """The cluster that a run had, without names of hosts."""

    system: str
    nodes: int
    cpus: float
    gpus: float
    accelerators: tuple[str, ...]
    memory_gib: float


class Spent(Stored):
    """By the whole run."""

    epochs: int = 0
    gpu_seconds: float = 0.0


class Record(Stored):
    """One run of one method on one problem with one seed.

    problem_name, method_name: how the config calls them.
    marks:      costs at which tables report.
    optimum:    the lowest F that there is, where it is known.
    versions:   of packages, and of the algorithm's code ("core"); None for one that is not installed.
    exhausted:  the method had nothing more to try before its budget was spent.
    refits:     metrics after a training on all data, by the position of the training with the same hyperparameters.
    search:     of one of raybilevel's own methods, what its state file holds; see `search_of`.
    verdict, diagnostics: of a run, as in its summary.
    """

    format: Literal[2] = FORMAT
    kind: Kind
    status: RunStatus
    error: str | None = None
    traceback: str | None = None
    problem_name: str
    method_name: str
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
    overhead: Overhead | None = None
    search: dict[str, Any] | None = None
    verdict: str | None = None
    diagnostics: dict[str, float | None] = {}

    @property
    def lowest(self) -> float | None:
        """The lowest F of a training that ran to its end."""
        return min((o.upper_loss for o in self.observations if o.upper_loss is not None), default=None)


def box(space: Space) -> tuple[Hyperparameter, ...]:
    """A space as a record has it."""
    return tuple(Hyperparameter(name=p.name, low=p.low, high=p.high, log=p.log) for p in space.parameters)
