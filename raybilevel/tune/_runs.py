"""How a search follows the runs of Tune that ask it: what each says of itself, and when another one begins."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import ray
from ray.tune.search.variant_generator import parse_spec_vars

from raybilevel._define_by_run import SpaceFunction
from raybilevel._tune_changes.run import TuneRun, tune_run
from raybilevel.errors import ConfigError
from raybilevel.problem import BilevelProblem
from raybilevel.tune._results import Objective
from raybilevel.tune._session import job_of_ray
from raybilevel.tune._setup import other_objective
from raybilevel.tune._slots import Slots
from raybilevel.tune._view import SearchView


class FollowsRuns(SearchView):
    """The part of a search that knows which run it serves."""

    problem: BilevelProblem
    _metric: str | None
    _mode: str | None
    _objective_given: bool
    _space: Mapping[str, Any] | SpaceFunction | None
    _samples: int | None
    _completed: set[str]
    _slots: Slots

    @abstractmethod
    def cancel_steps(self, timeout: float = 0.0) -> None: ...

    @abstractmethod
    def _set_up(
        self, param_space: Mapping[str, Any] | SpaceFunction, constants: Mapping[str, Any] | None = None
    ) -> None: ...

    @abstractmethod
    def _begin_session(self) -> None: ...

    @property
    def _objective(self) -> Objective:
        return Objective(self._metric or self.problem.upper_metric, self._mode or "min")

    def _take(self, metric: str | None, mode: str | None, param_space: Mapping[str, Any]) -> None:
        """Tune's metric, mode and constants, where the space was known before them.

        Raises:
            ConfigError: the search has another metric or mode, given to it or from an earlier run.
        """
        # `set_search_properties` sets it up, with all of these.
        if self._optimizer is None and self._not_given is None:
            return
        here = self._objective
        asked = Objective(metric or here.metric, mode or here.mode)
        _, domains, grids = parse_spec_vars(param_space)
        constants = {} if domains or grids else param_space  # Tune refuses a second space by itself
        # Points of earlier work are taken again when the search is set up.
        begun = any(training.proposal.origin != "evaluated" for training in self.state.trainings)
        if asked != here and (self._space is None or self._objective_given or begun):
            raise ConfigError(other_objective(asked, here))
        if self._space is None or begun:
            return
        if asked != here or constants or self._not_given is not None:
            self._metric, self._mode = asked.metric, asked.mode
            # Anew, as the method depends on the metric.
            self._set_up(self._space, constants)

    def _follow_run(self) -> TuneRun | None:
        """The run of Tune that is asking. Tune says nothing of another one where it has no space to tell."""
        run, job = tune_run(), job_of_ray()  # the run changes Tune until its end
        session = self._session
        another = session.job not in (None, job) or (run is not None and session.run not in (None, run))
        if another and self._optimizer is not None:
            self._begin_run()
        self._session.job = job
        if run is not None and self._session.run is None:
            self._session.run = run
            self._take(run.metric, run.mode, {})
            self._samples = run.samples
            self._slots.begin_run(run.samples)
            run.at_end(lambda: self._end_run(run))
        return run

    def _end_run(self, run: TuneRun) -> None:
        if self._session.run is run and ray.is_initialized():
            self.cancel_steps()

    @property
    def _is_complete(self) -> bool:
        """Whether all trials of the run have ended."""
        run = self._session.run
        if run is not None:
            return run.asks_no_more and not self.state.pending
        return self._samples is not None and len(self._completed) >= self._samples

    def _begin_run(self) -> None:
        """Go on with what is known from an earlier run; nothing of that is under way any more."""
        # Steps of another Ray went with it.
        if self._session.job == job_of_ray():
            self.cancel_steps()
        # Those of the run before, or this one's first trials would be taken for its last, and steps be cancelled.
        self._completed.clear()
        self._begin_session()
        optimizer = self._ready()
        optimizer.running.clear()
        optimizer.forget(optimizer.pending_trials)
