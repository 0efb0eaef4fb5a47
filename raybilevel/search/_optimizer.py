"""The search as ask/tell over plain values: asks trainings and upper-level steps, hears their results. No Ray."""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from raybilevel.errors import ConfigError, SpaceError, StateError
from raybilevel.methods._base import LoadCheckpoint, Method, UpperResult, UpperStep
from raybilevel.methods._registry import name_of
from raybilevel.problem import BilevelProblem
from raybilevel.search import _state_file as state_file
from raybilevel.search_state import Proposal, SearchState, StepRecord, Training
from raybilevel.space import Space, sobol_points


@dataclass(frozen=True)
class Observation:
    """What an ended training reports; see `TrainedLowerLevel`.

    lower_gradient: df/dx in the unit cube, shape (d,); NaN where it is not known.
    complete: it ran to its end; otherwise only `upper_loss`, `passes`, `excesses` and `others` count.
    excesses: how far each constrained metric is beyond its bound; see `Training`.
    others: the objectives beside F, to be minimised.
    """

    upper_loss: float
    lower_loss: float = math.nan
    lower_gradient: tuple[float, ...] = ()
    passes: float = 0.0
    complete: bool = True
    excesses: tuple[float, ...] = ()
    others: tuple[float, ...] = ()

    @property
    def finite(self) -> bool:
        known = not self.complete or all(map(math.isfinite, (self.lower_loss, *self.excesses, *self.others)))
        return math.isfinite(self.upper_loss) and known


class BilevelOptimizer:
    """Drives one search: `ask` for trainings, `plan` for upper-level steps, `tell` and `tell_step` for their results.

    Every decision is a function of the `SearchState`, which is values only; results may come in any order.
    """

    def __init__(
        self, space: Space, method: Method, seed: int = 0, slots: int = 1, points: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        if slots < 1:
            raise ConfigError(f"a search needs at least one slot, got {slots}")
        self.space, self.method, self.seed, self.slots = space, method, seed, slots
        self.state = SearchState()
        self.trials: dict[str, int] = {}
        self.running: dict[int, UpperStep] = {}
        self.memory: bytes | None = None
        given = [Proposal(tuple(space.encode(point).tolist()), "given") for point in points]
        design = method.start_design(space, slots, seed)
        # The user's points come before the design.
        self.queue = deque([*given, *(Proposal(tuple(unit.tolist()), "start") for unit in design)])

    @classmethod
    def from_saved(
        cls, saved: state_file.SavedOptimizer, method: Method, slots: int | None = None, space: Space | None = None
    ) -> BilevelOptimizer:
        """The search as it was saved, with the upper-level steps that were under way to be planned again.

        slots: where they are not to be those of the state.
        space: where its configs have more than its hyperparameters (`Space.fixed`), which is not in the state.

        Raises:
            StateError: the state is of another method, or of other settings.
        """
        if saved.method != name_of(method):
            raise StateError(f"the state is of method {saved.method!r}, this search is of {name_of(method)!r}")
        state_file.check_settings(saved.settings, state_file.as_json(asdict(method)))
        # Its start design gives way to the queue that was saved.
        optimizer = cls(space or Space(saved.parameters), method, saved.seed, slots or saved.slots)
        optimizer.state = saved.state
        optimizer.trials = dict(saved.trials)
        optimizer.queue = deque(saved.queue)
        optimizer.memory = state_file.decode(saved.memory)
        return optimizer

    def saved(self) -> state_file.SavedOptimizer:
        """What `from_saved` goes on from."""
        return state_file.SavedOptimizer(
            method=name_of(self.method),
            settings=state_file.as_json(asdict(self.method)),
            seed=self.seed,
            slots=self.slots,
            parameters=self.space.parameters,
            state=self.state,
            trials=dict(self.trials),
            queue=tuple(self.queue),
            memory=state_file.encode(self.memory),
        )

    def ask(self, trial: str) -> dict[str, Any] | None:
        """The hyperparameters to train next, nested as the space is; None while there are none."""
        # Asking again for a known trial must not use up a proposal.
        if trial in self.trials:
            return self.config(trial)
        enough = self.method.enough_stopped
        begun = self.state.done or (enough is not None and len(self.state.measured) >= enough)
        nothing = not (self.queue or self.running or self.design_under_way or begun)
        if nothing and not self.full and not self.exhausted:
            # The whole start design failed or was stopped: the method has nothing to plan from.
            self.fill()
        if not self.queue:
            return None
        proposal = self.queue.popleft()
        unit = torch.tensor(proposal.unit, dtype=torch.double)
        if self.space.grid and proposal.origin != "given":
            unit = self.space.in_cell(unit, [t.unit for t in self.state.trainings if t.status != "lost"])
        trained = self.space.rounded(unit)
        asked = torch.tensor(proposal.unit, dtype=torch.double)
        if (trained - asked).abs().max() > 1e-9:  # a step of a quantised hyperparameter moved it, or the grid
            proposal = replace(proposal, unit=tuple(trained.tolist()))
        self.trials[trial] = len(self.state.trainings)
        self.state = self.state.add(proposal)
        return self.config(trial)

    def ask_if_free(self, trial: str) -> dict[str, Any] | None:
        """The same, for a driver that does not count slots: None as well where there is none for one more trial."""
        return None if self.full and trial not in self.trials else self.ask(trial)

    def config(self, trial: str) -> dict[str, Any]:
        """What a known trial was asked to train."""
        return self.config_of(self.state.trainings[self.trials[trial]])

    def config_of(self, training: Training) -> dict[str, Any]:
        """A training's hyperparameters, nested as the space is."""
        return self.space.to_config(torch.tensor(training.unit, dtype=torch.double))

    def was_asked(self, trial: str, config: Mapping[str, Any]) -> bool:
        """Whether a config agrees with what a known trial was asked to train, as far as it names the same; to a
        millionth of the box."""
        try:
            trained = self.space.encode(config)
        except SpaceError:
            return True  # other entries only
        asked = self.space.encode(self.config(trial))
        return self.space.contains(config) and bool((trained - asked).abs().max() < 1e-6)

    def move(self, trial: str, config: Mapping[str, Any]) -> bool:
        """Know of a pending trial that it was trained elsewhere. Not if its config is no point of the space."""
        index = self.trials[trial]
        if not self.space.contains(config):
            return False
        if self.state.trainings[index].status == "pending":
            proposal = Proposal(tuple(self.space.encode(config).tolist()), "unknown")
            self.state = self.state.change(index, proposal=proposal)
        return True

    def without_running(self) -> BilevelOptimizer:
        """A copy in which the upper-level steps under way are to be planned again."""
        # Shallow will do: states are values, and what is changed in place is copied.
        other = copy.copy(self)
        other.running, other.queue, other.trials = {}, deque(self.queue), dict(self.trials)
        return other

    def tell(self, trial: str, observation: Observation | None) -> None:
        """A training's result; None if it failed. Unknown trials and repeated results are ignored.

        A result whose F, f, excess or other objective is not finite counts as a failure. An infinite entry of a
        gradient is not known.
        A failed training may succeed when it is tried again.
        """
        index = self.trials.get(trial)
        if index is None or self.state.trainings[index].status not in ("pending", "lost", "failed"):
            return
        before = self.state.trainings[index].finished
        # A failed training that is tried again keeps its place in the order.
        finished = before if before >= 0 else len(self.state.told)
        if observation is None or not observation.finite:
            self.state = self.state.change(index, status="failed", finished=finished)
            return
        self.state = self.state.change(
            index,
            status="done" if observation.complete else "stopped",
            finished=finished,
            lower_loss=observation.lower_loss,
            upper_loss=observation.upper_loss,
            lower_gradient=tuple(g if math.isfinite(g) else math.nan for g in observation.lower_gradient),
            passes=observation.passes,
            excesses=observation.excesses,
            others=observation.others,
        )

    def add(self, trial: str, config: Mapping[str, Any], observation: Observation | None) -> None:
        """A training that this search did not ask for, e.g. of an earlier experiment."""
        if trial not in self.trials:
            self.trials[trial] = len(self.state.trainings)
            self.state = self.state.add(Proposal(tuple(self.space.encode(config).tolist()), "evaluated"))
        self.tell(trial, observation)

    def plan(self) -> UpperStep | None:
        """The next upper-level step to run, None while there is none; it counts as running until `tell_step`.

        Trainings asked, proposals waiting and steps running together never exceed the slots.
        """
        method = self.method.upper_steps
        if method is None or self.queue or self.full:
            return None
        step = method.plan(self.state, tuple(self.running.values()), self.slots, self.seed)
        if step is not None:
            self.running[step.number] = step
        return step

    def run(
        self, problem: BilevelProblem, constants: Mapping[str, Any], step: UpperStep, load: LoadCheckpoint
    ) -> UpperResult:
        """Do a step that `plan` gave, in this process; its result is for `tell_step`."""
        method = self.method.upper_steps
        assert method is not None  # it has planned the step
        return method.run(problem, self.space, constants, step, load, self.memory)

    def tell_step(self, number: int, result: UpperResult | None) -> None:
        """What a step found; None if it failed: its proposal is replaced by a space-filling one."""
        step = self.running.pop(number, None)
        if step is None:
            return
        if result is None:
            self._record(StepRecord(number, step.centre, 0.0, failed=True))
            self._fill(step.seed)
            return
        for index, gradient in result.hypergradients.items():
            known = () if any(map(math.isinf, gradient)) else tuple(gradient)
            self.state = self.state.change(index, hypergradient=known)
        self._record(result.record)
        if result.memory is not None:
            self.memory = result.memory
        if result.proposal is not None:
            self.queue.append(result.proposal)

    def leave_out(self, index: int) -> None:
        """Have no step look for the hypergradient of a training again."""
        if self.state.trainings[index].hypergradient is None:
            self.state = self.state.change(index, hypergradient=())

    def _record(self, record: StepRecord) -> None:
        # When it was heard of decides which training it is charged to (`SearchState.costs`).
        self.state = self.state.after(replace(record, finished=len(self.state.told)))

    def fill(self) -> None:
        """Have a space-filling point to train, where the method has nothing to plan yet."""
        self._fill(self.seed + len(self.state.trainings))

    def _fill(self, seed: int) -> None:
        # Each seed scrambles the sequence anew, so that its first point is another one.
        unit = sobol_points(self.space.dimension, 1, seed)[0]
        self.queue.append(Proposal(tuple(unit.tolist()), "fill"))

    def lose(self, trial: str) -> None:
        """Give up a lost trial: its configuration is asked again. A late result still counts."""
        index = self.trials[trial]
        if self.state.trainings[index].status == "pending":
            self.state = self.state.change(index, status="lost")
            self.queue.appendleft(self.state.trainings[index].proposal)

    @property
    def pending_trials(self) -> list[str]:
        """Trials that are under way, as far as the search knows, in the order in which they were asked."""
        pending = {training.index for training in self.state.pending}
        return [trial for trial, index in self.trials.items() if index in pending]

    def adopt(self, trial: str, config: Mapping[str, Any]) -> bool:
        """Know of a trial that runs, or ran, without this search remembering that it asked for it.

        Returns:
            Whether it is known now; not if its config is no point of the space.
        """
        if trial in self.trials:
            return True
        try:
            if not self.space.contains(config):
                return False
        except SpaceError:
            return False
        unit = self.space.encode(config)
        proposal = Proposal(tuple(unit.tolist()), "unknown")
        # A search that was restored to a moment before it asked for this trial still has its proposal to ask.
        for waiting in self.queue:
            point = self.space.rounded(torch.tensor(waiting.unit, dtype=torch.double))
            if (point - unit).abs().max() < 1e-9:
                proposal = waiting
                self.queue.remove(waiting)
                break
        self.trials[trial] = len(self.state.trainings)
        self.state = self.state.add(proposal)
        return True

    def forget(self, trials: Collection[str]) -> None:
        """Give up pending trials that nobody will report; their configurations are asked again, in order.

        The newest trainings are taken back as if they had never been asked, so that the search repeats itself.
        """
        for trial in sorted(trials, key=lambda trial: -self.trials[trial]):
            index = self.trials[trial]
            if self.state.trainings[index].status != "pending":
                continue
            # Later trainings keep their indices, so that only the newest can be taken back.
            if index < len(self.state.trainings) - 1:
                self.lose(trial)
                continue
            self.queue.appendleft(self.state.trainings[index].proposal)
            self.state = self.state.without_last()
            del self.trials[trial]

    @property
    def best(self) -> Training | None:
        """The training that the method would return now: the one expected to be best on new data."""
        return self.method.incumbent(self.state)

    @property
    def full(self) -> bool:
        """Trainings and upper-level steps under way fill the slots."""
        return len(self.state.pending) + len(self.running) >= self.slots

    @property
    def has_too_little_for_a_step(self) -> bool:
        """Some of the start design have ended and left slots free, and no step can be planned before others have."""
        return not (self.queue or self.running or self.full) and bool(self.state.done) and self.design_under_way

    @property
    def design_under_way(self) -> bool:
        """Some of the start design have not ended."""
        return any(training.proposal.origin in ("start", "given") for training in self.state.pending)

    @property
    def exhausted(self) -> bool:
        """Nothing is under way and the method has nothing more to propose."""
        return not (self.queue or self.running or self.state.pending) and self.method.exhausted(self.state)
