"""What a search shows of itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from raybilevel._cluster.pace import StepTime
from raybilevel._models.pareto import front
from raybilevel.errors import ProblemError, SpaceError
from raybilevel.search import BilevelOptimizer, NewData, new_data
from raybilevel.search_state import SearchState, Training
from raybilevel.space import Space
from raybilevel.tune._checkpoints import Checkpoints
from raybilevel.tune._session import Session


class NoSpaceYetError(SpaceError, RuntimeError):
    """A search is asked before it knows what to search; Ray's own searchers raise a `RuntimeError` then."""


class SearchView:
    """The public look at a searcher's parts, for callbacks and reports."""

    _optimizer: BilevelOptimizer | None
    _checkpoints: Checkpoints
    _session: Session
    _not_given: ProblemError | None

    @property
    def state(self) -> SearchState:
        """Every training and upper-level step so far."""
        return self._optimizer.state if self._optimizer is not None else SearchState()

    @property
    def best(self) -> Training | None:
        """The training expected to be best on new data, which need not be the one with the lowest F, `state.best`; None
        before one has ended. With constraints it is of those that keep them, if any does: see its `feasible`."""
        return self._ready().best

    @property
    def pareto_front(self) -> tuple[Training, ...]:
        """The trainings that no other beats in one objective and equals in the rest, by the first one; of a search of
        one metric, the one with the lowest F. With constraints it is of those that keep them, if any does."""
        return front(self.state)

    @property
    def new_data(self) -> NewData | None:
        """What to expect of it on new data, in numbers and in words; None where F is no likelihood, or too little is
        known."""
        return new_data(self.state, self.best)

    @property
    def space(self) -> Space:
        return self._ready().space

    @property
    def exhausted(self) -> bool:
        """The method has nothing more to propose."""
        return self._optimizer is not None and self._optimizer.exhausted

    @property
    def steps_under_way(self) -> int:
        return len(self._session.steps)

    @property
    def step_times(self) -> Sequence[StepTime]:
        """Of the upper-level steps that were heard of in this Ray session."""
        return self._session.steps.pace.steps

    def index_of(self, trial_id: str) -> int | None:
        """The training that a trial is."""
        return self._ready().trials.get(trial_id)

    def checkpoint_of(self, training: Training) -> str | None:
        """Where a training's weights lie on the experiment's filesystem."""
        return self._checkpoints.paths.get(training.index)

    def config_of(self, training: Training) -> dict[str, Any]:
        """A training's hyperparameters, nested as the space is."""
        return self._ready().config_of(training)

    def _ready(self) -> BilevelOptimizer:
        if self._not_given is not None:
            raise self._not_given
        if self._optimizer is None:
            raise NoSpaceYetError(
                "BilevelSearch has no search space yet; pass param_space to tune.Tuner (config to tune.run), or space "
                "to BilevelSearch"
            )
        return self._optimizer
