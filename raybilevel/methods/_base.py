"""What a method is: where to train first, when to take an upper-level step, and what a step does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

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


class Method(Protocol):
    """A frozen dataclass of settings."""

    def start_design(self, dimension: int, slots: int, seed: int) -> Tensor:
        """The first trainings, shape (n, d), in the unit cube."""

    def plan(self, state: SearchState, running: tuple[UpperStep, ...], slots: int, seed: int) -> UpperStep | None:
        """The next upper-level step, None while there is nothing to do; cheap, it runs in the driver."""

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

    def incumbent(self, state: SearchState) -> Training | None:
        """The training whose hyperparameters the method recommends so far."""

    def converged(self, state: SearchState) -> bool:
        """Whether it expects no better training than the incumbent."""

    def exhausted(self, state: SearchState) -> bool:
        """Whether the method has nothing more to do, whatever the budget."""
