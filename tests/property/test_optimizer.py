"""Any order of events: results, failures, repeats, strangers, lost trials, upper-level steps."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from raybilevel.methods import Default
from raybilevel.methods._base import UpperResult
from raybilevel.search._optimizer import BilevelOptimizer, Observation
from raybilevel.search_state import Proposal, SearchState, StepRecord
from raybilevel.space import Parameter, Space

SPACE = Space((Parameter(("group", "a"), 1e-3, 10.0, log=True),))  # one: its design has three points only
results = st.one_of(
    st.none(),
    st.just(Observation(math.nan, 0.0, (0.0,))),
    st.just(Observation(0.5, math.inf, (0.0,))),
    st.builds(Observation, st.floats(-9, 9), st.floats(-9, 9), st.tuples(st.floats(-9, 9))),
    st.builds(Observation, st.floats(-9, 9), passes=st.just(1.0), complete=st.just(False)),
)
units = st.tuples(st.floats(0, 1))


class Events(RuleBasedStateMachine):
    """What a driver with a few slots may do to an optimizer, beside a plain record of what it was told.

    The driver keeps to its slots when it asks, as Tune does; it loses trials and hears of them late.
    """

    @initialize(slots=st.integers(1, 4), seed=st.integers(0, 3), prepared=st.booleans())
    def begin(self, slots: int, seed: int, prepared: bool) -> None:
        """Half of the time with the start design behind it, to get further in as many events."""
        self.optimizer = BilevelOptimizer(SPACE, Default(explore_every=2), seed, slots)
        self.asked: dict[str, dict[str, Any]] = {}
        self.heard: dict[str, Observation | None] = {}
        self.lost: set[str] = set()
        self.started = False  # the design, which may be larger than the slots, has been asked
        while prepared and not self.started:
            self.ask()
            trial = self.busy[0]
            self.heard[trial] = Observation(1.0, 1.0, (0.0,))
            self.optimizer.tell(trial, self.heard[trial])

    @property
    def busy(self) -> list[str]:
        return [trial for trial in self.asked if trial not in self.heard and trial not in self.lost]

    @property
    def free(self) -> int:
        return self.optimizer.slots - len(self.busy) - len(self.optimizer.running)

    @rule()
    @precondition(lambda self: self.free > 0)
    def ask(self) -> None:
        trial = f"trial {len(self.asked)}"
        config = self.optimizer.ask(trial)
        if config is not None:
            self.asked[trial] = config
        self.started = self.started or not self.optimizer.queue

    @rule(data=st.data(), observation=results)
    @precondition(lambda self: self.asked)
    def tell(self, data: st.DataObject, observation: Observation | None) -> None:
        """A result, of any trial: the first that did not fail counts, whether or not the trial was lost; repeats are
        ignored."""
        trial = data.draw(st.sampled_from(sorted(self.asked)))
        before = self.heard.get(trial)
        if before is None or not before.finite:
            self.heard[trial] = observation
        self.optimizer.tell(trial, observation)

    @rule(observation=results)
    def a_stranger_reports(self, observation: Observation | None) -> None:
        before = self.optimizer.state
        self.optimizer.tell("stranger", observation)
        assert self.optimizer.state == before

    @rule(data=st.data())
    @precondition(lambda self: self.busy)
    def lose(self, data: st.DataObject) -> None:
        trial = data.draw(st.sampled_from(self.busy))
        self.lost.add(trial)
        self.optimizer.lose(trial)

    @rule()
    def plan(self) -> None:
        waiting = len(self.optimizer.queue)
        step = self.optimizer.plan()
        if step is not None:
            assert waiting == 0
            assert self.optimizer.state.trainings[step.centre].status == "done"
            assert all(self.optimizer.state.trainings[i].status == "done" for i in step.targets)

    @rule(data=st.data(), unit=units, fails=st.booleans())
    @precondition(lambda self: self.optimizer.running)
    def a_step_ends(self, data: st.DataObject, unit: tuple[float, ...], fails: bool) -> None:
        number = data.draw(st.sampled_from(sorted(self.optimizer.running)))
        step = self.optimizer.running[number]
        found = dict.fromkeys(step.targets, (0.1,))
        record = StepRecord(number, step.centre, 1.0)
        proposal = Proposal(unit, step.origin, step.region, predicted_upper_loss=0.0)
        self.optimizer.tell_step(number, None if fails else UpperResult(record, proposal, found))

    @rule(number=st.integers(0, 50))
    def a_step_is_heard_again(self, number: int) -> None:
        if number not in self.optimizer.running:
            before = self.optimizer.state, len(self.optimizer.queue)
            self.optimizer.tell_step(number, None)
            assert (self.optimizer.state, len(self.optimizer.queue)) == before

    @invariant()
    def each_result_stays_with_its_point(self) -> None:
        for trial, config in self.asked.items():
            training = self.optimizer.state.trainings[self.optimizer.trials[trial]]
            assert self.optimizer.config(trial) == config
            observation = self.heard.get(trial)
            if trial not in self.heard:
                assert training.status == ("lost" if trial in self.lost else "pending")
            elif observation is None or not observation.finite:
                assert training.status == "failed" and math.isnan(training.upper_loss)
            else:
                assert training.status == ("done" if observation.complete else "stopped")
                assert training.upper_loss == observation.upper_loss
                known = [g if math.isfinite(g) else math.nan for g in observation.lower_gradient]
                assert list(training.lower_gradient) == pytest.approx(known, rel=0, abs=0, nan_ok=True)

    @invariant()
    def the_slots_are_never_exceeded(self) -> None:
        optimizer = self.optimizer
        assert len(optimizer.state.pending) == len(self.busy)
        under_way = len(optimizer.state.pending) + len(optimizer.running)
        assert under_way <= optimizer.slots
        if self.started:
            assert under_way + len(optimizer.queue) <= optimizer.slots

    @invariant()
    def numbers_are_given_once(self) -> None:
        numbers = [step.number for step in self.optimizer.state.steps] + list(self.optimizer.running)
        assert sorted(numbers) == list(range(len(numbers)))
        told = [training.finished for training in self.optimizer.state.told]
        assert told == list(range(len(told)))

    @invariant()
    def what_is_remembered_is_what_would_be_worked_out(self) -> None:
        state = self.optimizer.state
        afresh = SearchState(state.trainings, state.steps)
        for name in ("told", "done", "measured", "pending", "sorted_upper", "best"):
            assert getattr(state, name) == getattr(afresh, name), name
        assert state.passes_per_training == afresh.passes_per_training
        histories, anew = ({r: h.trainings for r, h in one.regions.items()} for one in (state, afresh))
        assert histories == anew

    @invariant()
    def there_is_always_something_to_do(self) -> None:
        """Whatever failed or was lost: where nothing is under way, there is a next training or a next step."""
        if not self.busy and not self.optimizer.running:
            copied = self.optimizer.without_running()
            assert copied.plan() is not None or copied.ask("next") is not None


TestEvents = Events.TestCase
# Without hypothesis's explanations, which take a minute where the test fails.
TestEvents.settings = settings(max_examples=200, stateful_step_count=40, phases=(Phase.generate, Phase.shrink))
