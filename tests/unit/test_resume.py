"""A search that is saved and read back goes on as if nothing had happened."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from raybilevel._lower.training import load_checkpoint, train
from raybilevel._metric_bounds import read_bounds
from raybilevel.errors import StateError
from raybilevel.methods import Default, Paper
from raybilevel.search import _local as local
from raybilevel.search import _state_file as state_file
from raybilevel.search._optimizer import BilevelOptimizer, Observation
from raybilevel.search._state_file import SavedSearch
from raybilevel.space import Parameter, Space
from raybilevel.tune._resume import check_saved
from tests.problems_for_tests import Ridge
from tests.tiny_problems import Means

PROBLEM = Ridge(dimension=2)
METHODS = {
    "default": (Default(), 8),
    "paper": (Paper(iterations=3, steps=5, learning_rates=(0.05,), momenta=(0.5,)), 28),
}


def drive(search: BilevelOptimizer, checkpoints: dict[int, bytes], trainings: int) -> list[str]:
    """`local.search`, but from wherever it stands and up to so many trainings; the configs it asked for."""
    asked = []
    while len(search.state.trainings) < trainings:
        while (step := search.plan()) is not None:
            result = search.run(PROBLEM, {}, step, lambda index: load_checkpoint(checkpoints[index]))
            search.tell_step(step.number, result)
        trial = f"trial_{len(search.state.trainings)}"
        config = search.ask(trial)
        assert config is not None
        asked.append(repr(config))
        trained, checkpoints[search.trials[trial]] = train(PROBLEM, config, search.seed)
        search.tell(trial, local.observe(search.space, config, trained))
    return asked


def save(search: BilevelOptimizer, path: Path) -> None:
    saved = SavedSearch(**vars(search.saved()), metric="upper_loss", mode="min", constants="{}", checkpoints={})
    state_file.write(path, saved)


def restore(path: Path, method: Default | Paper) -> BilevelOptimizer:
    return BilevelOptimizer.from_saved(state_file.read(path), method)


@pytest.mark.parametrize("name", METHODS)
def test_a_restored_search_asks_as_the_uninterrupted_one(tmp_path: Path, name: str):
    method, total = METHODS[name]
    checkpoints: dict[int, bytes] = {}
    search = BilevelOptimizer(PROBLEM.space, method, seed=3)
    drive(search, checkpoints, total - 2)  # after one upper-level step, so that its record and memory matter
    save(search, tmp_path / "state.json")
    restored = restore(tmp_path / "state.json", method)
    assert restored.state == search.state
    kept = dict(checkpoints)
    assert drive(search, checkpoints, total) == drive(restored, kept, total)
    assert restored.state == search.state
    assert any(t.proposal.origin == "region" for t in search.state.trainings)


def test_of_other_constraints_both_are_named(tmp_path: Path):
    bounds, other = read_bounds({"ms": "<= 5", "size": ">= -0.5"}), read_bounds({"ms": "<= 4"})
    search = BilevelOptimizer(Space((Parameter(("a",), 0.0, 1.0),)), Default())
    search.ask("t")
    search.tell("t", Observation(1.0, 1.0, (0.0,), 1.0, excesses=(0.2, -0.3)))
    more = {"metric": "upper_loss", "mode": "min", "constants": "{}", "checkpoints": {}}
    state_file.write(tmp_path / "state.json", SavedSearch(**vars(search.saved()), **more, constraints=bounds))
    saved = state_file.read(tmp_path / "state.json")
    assert saved.constraints == bounds and saved.state == search.state
    check_saved(saved, None, None, None, bounds)
    for now, words in ((other, r"this search has \{'ms': '<= 4'\}"), ((), r"this search has \{\}")):
        with pytest.raises(
            StateError, match=r"the state is of constraints \{'ms': '<= 5', 'size': '>= -0.5'\}; " + words
        ):
            check_saved(saved, None, None, None, now)


def test_of_another_space_what_differs_is_named(tmp_path: Path):
    def box(*parameters: Parameter) -> Space:
        return Space((*(Parameter((f"kept{i}",), 0.0, 1.0) for i in range(30)), *parameters))

    before, now = Parameter(("rate",), 1e-3, 1.0, log=True), Parameter(("rate",), 0.0, 1.0)
    save(BilevelOptimizer(box(before), Default()), tmp_path / "state.json")
    saved = state_file.read(tmp_path / "state.json")
    check_saved(saved, box(before), None, None)
    for other, words in (
        (box(now), "the space with rate: loguniform(0.001, 1.0); this search is of one with rate: uniform(0.0, 1.0)"),
        (box(), "the space with rate: loguniform(0.001, 1.0); this search is of one with nothing else"),
        (box(replace(before, smooth=False)), "smooth=True"),
    ):
        with pytest.raises(StateError, match=re.escape(words)) as caught:
            check_saved(saved, other, None, None)
        assert "kept" not in str(caught.value)


def test_a_search_saved_with_a_step_under_way_takes_it_again(tmp_path: Path):
    checkpoints: dict[int, bytes] = {}
    search = BilevelOptimizer(PROBLEM.space, Default(), seed=3)
    drive(search, checkpoints, 5)
    step = search.plan()
    assert step is not None
    save(search, tmp_path / "state.json")
    assert restore(tmp_path / "state.json", Default()).plan() == step


def test_a_search_saved_with_a_training_under_way_knows_it(tmp_path: Path):
    checkpoints: dict[int, bytes] = {}
    search = BilevelOptimizer(PROBLEM.space, Default(start_points=5), seed=3)
    drive(search, checkpoints, 3)
    config = search.ask("under way")
    assert config is not None
    save(search, tmp_path / "state.json")
    restored = restore(tmp_path / "state.json", Default(start_points=5))
    assert restored.ask("under way") == config
    assert [t.index for t in restored.state.pending] == [3]
    trained, _ = train(PROBLEM, config, 3)
    restored.tell("under way", local.observe(restored.space, config, trained))
    assert not restored.state.pending


def test_a_trial_lost_before_a_save_stays_lost(tmp_path: Path):
    search = BilevelOptimizer(PROBLEM.space, Default(), seed=3)
    search.ask("lost")
    search.lose("lost")
    save(search, tmp_path / "state.json")
    restored = restore(tmp_path / "state.json", Default())
    assert restored.state.pending == ()
    assert list(restored.queue) == list(search.queue)


def test_a_restored_search_knows_how_far_hyperparameters_may_differ(tmp_path: Path):
    problem = Means((0.4,) * 4)
    search = BilevelOptimizer(problem.space, Default(), seed=3)
    checkpoints = local.search(problem, search, 18)
    assert search.state.shrinkage is not None
    save(search, tmp_path / "state.json")
    restored = restore(tmp_path / "state.json", Default())
    assert restored.state == search.state
    assert restored.method.incumbent(restored.state) == search.method.incumbent(search.state) != search.state.best
    step, again = search.plan(), restored.plan()
    assert step is not None and step == again
    found = [
        Default().run(problem, problem.space, {}, one, lambda index: load_checkpoint(checkpoints[index]))
        for one in (step, again)
    ]
    assert found[0].proposal == found[1].proposal
