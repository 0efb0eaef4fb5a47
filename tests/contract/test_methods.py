"""What every method must do: those that there are, and one of a user's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

import pytest
import torch
from torch import Tensor

from raybilevel._lower.training import load_checkpoint, train
from raybilevel.errors import ConfigError, StateError
from raybilevel.hypergradient._descent import BilevelDescent
from raybilevel.methods import METHODS, Default, HypergradientDescent, Method, Paper, make_method
from raybilevel.methods._base import LoadCheckpoint, StepMethod, UpperResult, UpperStep
from raybilevel.methods._registry import name_of
from raybilevel.problem import BilevelProblem
from raybilevel.search import BilevelOptimizer, Observation, observe
from raybilevel.search import _state_file as state_file
from raybilevel.search._checks import check_search
from raybilevel.search_state import Proposal, SearchState, StepRecord
from raybilevel.space import Space
from tests.problems_for_tests import Ridge

PROBLEM = Ridge(dimension=1)
SEED = 3


@dataclass(frozen=True)
class Towards(Method):
    """Goes from the best point part of the way to the last one that a step proposed, which it remembers."""

    share: float = 0.3

    @property
    def upper_steps(self) -> StepMethod:
        return self

    def for_metric(self, metric: str) -> Self:
        return self

    def start_design(self, space: Space, slots: int, seed: int) -> Tensor:
        return torch.tensor([[0.2], [0.9]], dtype=torch.double).expand(2, space.dimension)

    def plan(self, state: SearchState, running: tuple[UpperStep, ...], slots: int, seed: int) -> UpperStep | None:
        if state.best is None or running or state.pending:
            return None
        return UpperStep(len(state.steps), "towards", state.best.index, state, seed)

    def run(
        self,
        problem: BilevelProblem,
        space: Space,
        constants: Mapping[str, Any],
        step: UpperStep,
        load: LoadCheckpoint,
        memory: bytes | None = None,
    ) -> UpperResult:
        best, last = step.state.trainings[step.centre].unit, float(memory or b"1.0")
        unit = tuple(u + self.share * (last - u) for u in best)
        record = StepRecord(step.number, step.centre, passes=0.0)
        return UpperResult(record, Proposal(unit, step.origin), memory=str(unit[0]).encode())


@dataclass(frozen=True)
class Case:
    """A method, and what is known of it.

    trials:  so many take it past its start design and two steps.
    changed: some of its settings with other values.
    any_metric: whether it can search metrics other than the upper-level loss.
    """

    method: Method
    trials: int
    changed: Mapping[str, Any]
    any_metric: bool = False


CASES = {
    "default": Case(Default(), 6, {"explore_every": 3, "decrease": 0.1, "upper_share": 0.5}, any_metric=True),
    "hypergradient": Case(
        HypergradientDescent(steps=2, lower="tolerance", lower_tolerance=1e-6),
        4,
        {"steps": 3, "solver_settings": {"limit": 7}, "estimator": "unrolled"},
    ),
    "paper": Case(
        Paper(iterations=2, steps=5, learning_rates=(0.05,), momenta=(0.5,)),
        7,
        {"iterations": 3, "learning_rates": (0.05, 0.1), "growth": 2.0},
    ),
    "a user's": Case(Towards(), 5, {"share": 0.5}, any_metric=True),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


class Driven:
    """A search with its trials run in this process, whatever they are."""

    def __init__(self, search: BilevelOptimizer, checkpoints: Mapping[int, bytes] | None = None) -> None:
        self.search, self.checkpoints = search, dict(checkpoints or {})
        self.steps: list[UpperStep] = []

    def load(self, index: int) -> Mapping[str, Any]:
        return load_checkpoint(self.checkpoints[index])

    def plan(self) -> UpperStep | None:
        step = self.search.plan()
        if step is not None:
            self.steps.append(step)
        return step

    def to(self, trials: int) -> list[dict[str, Any]]:
        """Run until there are so many trials; what was asked for."""
        asked = []
        while len(self.search.state.trainings) < trials:
            while (step := self.plan()) is not None:
                self.search.tell_step(step.number, self.search.run(PROBLEM, {}, step, self.load))
            trial = str(len(self.search.state.trainings))
            config = self.search.ask(trial)
            assert config is not None
            asked.append(config)
            self.search.tell(trial, self.run(config, len(self.search.state.trainings) - 1))
        return asked

    def run(self, config: dict[str, Any], index: int) -> Observation:
        settings = self.search.method.descent
        if settings is None:
            trained, self.checkpoints[index] = train(PROBLEM, config, SEED)
            return observe(PROBLEM.space, config, trained)
        descent = BilevelDescent(PROBLEM, config, settings, PROBLEM.space, SEED)
        while not descent.finished:
            descent.run_step()
        found = descent.conclude()
        return Observation(found["upper_loss"], found["lower_loss"], (0.0,), descent.passes)


def begin(method: Method) -> Driven:
    return Driven(BilevelOptimizer(PROBLEM.space, method, SEED))


def save(search: BilevelOptimizer, path: Path) -> state_file.SavedSearch:
    saved = state_file.SavedSearch(
        **vars(search.saved()), metric="upper_loss", mode="min", constants="{}", checkpoints={}
    )
    state_file.write(path, saved)
    return state_file.read(path)


def test_every_method_is_here() -> None:
    assert {type(case.method) for case in CASES.values()} == {*METHODS.values(), Towards}


# What it is called.


def test_it_has_a_name_of_its_own(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    name, kind = name_of(case.method), type(case.method)
    if name in METHODS:
        assert METHODS[name] is kind and name_of(make_method(name)) == name
    else:
        assert name == f"{kind.__module__}.{kind.__qualname__}"
        monkeypatch.setitem(METHODS, "mine", kind)
        assert name_of(make_method("mine", **case.changed)) == "mine"

    class Another(kind):
        pass

    assert name_of(Another()) != name


def test_it_searches_the_problem_and_says_for_how_many_hyperparameters(case: Case) -> None:
    check_search(PROBLEM, PROBLEM.space, {}, case.method)
    assert case.method.most_hyperparameters is None or case.method.most_hyperparameters >= PROBLEM.dimension
    assert (case.method.upper_steps is None) or (case.method.descent is None)


# Where it starts, what it plans, and what a step does.


@pytest.mark.parametrize("slots", [1, 4])
def test_its_start_design_lies_in_the_cube_and_is_the_same_again(case: Case, slots: int) -> None:
    designs = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        designs.append(case.method.start_design(PROBLEM.space, slots, SEED))
    assert torch.equal(*designs)
    count, dimension = designs[0].shape
    assert count >= 1 and dimension == PROBLEM.dimension and designs[0].dtype == torch.double
    assert bool(((designs[0] >= 0) & (designs[0] <= 1)).all())


def test_with_no_results_it_plans_nothing_and_recommends_nothing(case: Case) -> None:
    empty, asked = SearchState(), begin(case.method).search
    asked.ask("0")
    for state in (empty, asked.state):
        assert case.method.upper_steps is None or case.method.upper_steps.plan(state, (), 4, SEED) is None
        assert case.method.incumbent(state) is None
    assert asked.plan() is None and not asked.exhausted


def test_steps_are_pure_functions_whose_proposals_are_trained_next(case: Case) -> None:
    driven = begin(case.method)
    driven.to(case.trials)
    search = driven.search
    if case.method.upper_steps is None:
        assert not driven.steps and not search.state.steps
        assert all(training.proposal.origin == "start" for training in search.state.trainings)
        return
    assert len(driven.steps) >= 2 and all(step.origin for step in driven.steps)
    first = driven.steps[0]
    results = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        results.append(case.method.upper_steps.run(PROBLEM, PROBLEM.space, {}, first, driven.load))
    assert results[0] == results[1]
    assert results[0].record.number == first.number
    proposal = results[0].proposal
    assert proposal is not None and all(0 <= u <= 1 for u in proposal.unit)
    design = len(case.method.start_design(PROBLEM.space, 1, SEED))
    assert search.state.trainings[design].proposal == proposal


def test_it_recommends_one_of_its_trainings(case: Case) -> None:
    driven = begin(case.method)
    driven.to(case.trials)
    assert case.method.incumbent(driven.search.state) in driven.search.state.done
    assert case.method.converged(driven.search.state) in (True, False)


# Saved and read back.


def test_its_state_is_read_back_and_resumed_to_the_same_proposals(case: Case, tmp_path: Path) -> None:
    driven = begin(case.method)
    driven.to(case.trials - 1)  # after a step, so that its record and memory matter
    saved = save(driven.search, tmp_path / "state")
    resumed = Driven(BilevelOptimizer.from_saved(saved, case.method), driven.checkpoints)
    assert resumed.search.state == driven.search.state
    assert driven.to(case.trials) == resumed.to(case.trials)
    assert resumed.search.state == driven.search.state
    assert driven.steps[-1:] == resumed.steps[-1:]


def test_a_step_under_way_is_planned_again_after_a_restore(case: Case, tmp_path: Path) -> None:
    driven = begin(case.method)
    driven.to(case.trials - 1)
    step = driven.search.plan()
    saved = save(driven.search, tmp_path / "state")
    assert BilevelOptimizer.from_saved(saved, case.method).plan() == step


def test_other_settings_and_other_methods_are_refused(case: Case, tmp_path: Path) -> None:
    driven = begin(case.method)
    driven.search.ask("0")
    saved = save(driven.search, tmp_path / "state")
    assert set(case.changed) <= {field.name for field in fields(case.method)}
    for name, value in case.changed.items():
        with pytest.raises(StateError, match=rf"other settings: {name}[.\w]* is .* in the state and .* in this search"):
            BilevelOptimizer.from_saved(saved, replace(case.method, **{name: value}))
    for other in CASES.values():
        if other is not case:
            with pytest.raises(StateError, match="the state is of method"):
                BilevelOptimizer.from_saved(saved, other.method)


# Another metric, and trials that fail.


def test_another_metric_is_searched_by_values_or_refused(case: Case) -> None:
    if not case.any_metric:
        with pytest.raises(ConfigError, match=r"searches 'upper_loss' only, not metric='accuracy'"):
            case.method.for_metric("accuracy")
        return
    method = case.method.for_metric("accuracy")
    assert type(method) is type(case.method)
    driven = begin(method)
    driven.to(case.trials)
    assert driven.steps and not any(step.targets for step in driven.steps)


def test_where_every_trial_fails_it_goes_on_with_other_points_or_ends(case: Case) -> None:
    search = begin(case.method).search
    design = len(search.queue)
    for number in range(design + 3):
        config = search.ask(str(number))
        if config is None:
            assert number >= design and search.exhausted
            return
        assert search.plan() is None
        search.tell(str(number), None)
    assert len({training.unit for training in search.state.trainings}) == design + 3
    assert case.method.incumbent(search.state) is None
