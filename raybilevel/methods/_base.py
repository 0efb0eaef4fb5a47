"""What a method is: what it trains, where first, and, where it takes upper-level steps, when and how."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, Self

from torch import Tensor

from raybilevel._metric_bounds import Bounds
from raybilevel._objectives import Others, as_written
from raybilevel.errors import ConfigError
from raybilevel.hypergradient import DescentSettings, check_smooth
from raybilevel.problem import BilevelProblem
from raybilevel.search_state import Origin, Proposal, SearchState, StepRecord, Training, Unit
from raybilevel.space import Space

LoadCheckpoint = Callable[[int], Mapping[str, Any]]
"""The checkpoint of a training, by its index."""


@dataclass(frozen=True)
class UpperStep:
    """One upper-level step to be done: plain values, to be sent to wherever it runs.

    targets: trainings whose weights it descends from, i.e. whose checkpoints it needs.
    centre:  the training around which it proposes.
    region, radius: the trust region; for "region" steps.
    pending: points being trained or about to be.
    rank:    how many other proposals the same region has under way.
    most_memory: bytes beside the problem that it may take on the CPU; None for no bound.
    """

    number: int
    origin: Origin
    centre: int
    state: SearchState
    seed: int
    targets: tuple[int, ...] = ()
    region: int | None = None
    radius: float = 0.0
    pending: tuple[Unit, ...] = ()
    rank: int = 0
    most_memory: float | None = None


@dataclass(frozen=True)
class UpperResult:
    """What an upper-level step found.

    proposal:       the next training, None where it has none.
    hypergradients: by index of the training, in the unit cube.
    memory:         what the method's next step needs of this one, e.g. an iterate's weights.
    unreadable:     targets whose checkpoints could not be read, and why; the step went on without.
    """

    record: StepRecord
    proposal: Proposal | None
    hypergradients: Mapping[int, Unit] = field(default_factory=dict)
    memory: bytes | None = None
    unreadable: Mapping[int, str] = field(default_factory=dict)


class StepMethod(Protocol):
    """What plans upper-level steps, in the driver, and runs them, anywhere."""

    def plan(self, state: SearchState, running: tuple[UpperStep, ...], slots: int, seed: int) -> UpperStep | None:
        """The next upper-level step, None while there is nothing to do; cheap."""

    def run(
        self,
        problem: BilevelProblem,
        space: Space,
        constants: Mapping[str, Any],
        step: UpperStep,
        load: LoadCheckpoint,
        memory: bytes | None = None,
    ) -> UpperResult:
        """Do a step; a pure function of its arguments, as heavy as it needs to be."""


class Method(Protocol):
    """What to train next, as a frozen dataclass of settings that derives from this class.

    Only `start_design` must be written; the rest has defaults. Callers ask a method what they need to know of it, and
    never which one it is.

    most_hyperparameters: that it is meant for; None for any number.
    searches_by_values: whether it takes hyperparameters in which the lower level's loss is not differentiable.
    takes_constraints: whether it searches for the lowest F among trainings that keep bounds on other metrics.
    takes_others: whether it searches a Pareto front of F and other metrics.
    takes_priors: whether it begins, and looks, where the user expects the optimum.
    fills_slots: whether a slot that is free until the first step can be planned may train a space-filling point.
    enough_stopped: after so many trainings that were stopped before their end, and none that was not, it plans steps
        by their values; None if it never does.
    """

    # Methods are dataclasses: the names of their settings are read off their fields (`make_method`).
    __dataclass_fields__: ClassVar[dict[str, Any]]
    most_hyperparameters: ClassVar[int | None] = 100
    searches_by_values: ClassVar[bool] = False
    takes_constraints: ClassVar[bool] = False
    takes_others: ClassVar[bool] = False
    takes_priors: ClassVar[bool] = False
    fills_slots: ClassVar[bool] = False
    enough_stopped: ClassVar[int | None] = None

    def start_design(self, space: Space, slots: int, seed: int) -> Tensor:
        """The first trials, shape (n, d), in the unit cube."""

    @property
    def upper_steps(self) -> StepMethod | None:
        """What plans and runs its upper-level steps, e.g. itself; None where it takes none."""
        return None

    @property
    def descent(self) -> DescentSettings | None:
        """The settings of the descent that each of its trials is; None where a trial is a lower-level training."""
        return None

    def check(self, problem: BilevelProblem, space: Space) -> None:
        """Refuse what it cannot search, before anything is trained.

        Raises:
            ConfigError, ProblemError: the method cannot search this problem, or not over this space.
        """
        if space.of_starts:
            raise ConfigError(
                f"{type(self).__name__} searches hyperparameters, and upper_variables() are none; use "
                "method='hypergradient', or give a space"
            )
        if not self.searches_by_values:
            check_smooth(type(self).__name__, space)

    def for_metric(self, metric: str) -> Self:
        """The method that searches a metric other than the upper-level loss, of which there are no hypergradients.

        Raises:
            ConfigError: it needs hypergradients, or gradients of the upper-level loss.
        """
        raise ConfigError(f"{type(self).__name__} searches 'upper_loss' only, not metric={metric!r}")

    def incumbent(self, state: SearchState) -> Training | None:
        """The training whose hyperparameters the method recommends so far: by default the one with the lowest F, of
        those that ran to their end if any did, and of those that keep the constraints if any does."""
        return state.best or min(state.measured, key=lambda t: t.rank, default=None)

    def converged(self, state: SearchState) -> bool:
        """Whether it expects no better training than the incumbent."""
        return False

    def exhausted(self, state: SearchState) -> bool:
        """Whether the method has nothing more to do, whatever the budget."""
        return False


def check_constraints(method: Method, bounds: Bounds) -> None:
    """Refuse constraints on metrics where a method takes none.

    Raises:
        ConfigError: it takes none, and there are some.
    """
    if bounds and not method.takes_constraints:
        raise ConfigError(f"constraints: {type(method).__name__} takes none; use method='default', or leave them out")


def check_others(method: Method, others: Others) -> None:
    """Refuse objectives beside the first where a method takes none.

    Raises:
        ConfigError: it takes none, and there are some.
    """
    if others and not method.takes_others:
        raise ConfigError(
            f"{type(method).__name__} searches one metric, not {', '.join(as_written(others))} too; use "
            "method='default', or leave them out"
        )


def check_priors(method: Method, space: Space) -> None:
    """Refuse priors where a method takes none.

    Raises:
        ConfigError: it takes none, and there are some.
    """
    if space.has_priors and not method.takes_priors:
        raise ConfigError(f"priors: {type(method).__name__} takes none; use method='default', or leave them out")
