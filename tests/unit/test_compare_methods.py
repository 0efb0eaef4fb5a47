from __future__ import annotations

import contextlib
import importlib.util
import math
from dataclasses import replace
from typing import Any

import pytest

from raybilevel._compare.execute import probe_parts, samples_of
from raybilevel._compare.methods import (
    Parts,
    Setting,
    UnavailableError,
    bounds,
    grid,
    make_scheduler,
    make_searcher,
    parse,
)
from raybilevel._compare.searchers import TimedSearcher
from raybilevel._config.space import read_space
from raybilevel._records.names import OWN_METHODS
from raybilevel.errors import ConfigError
from raybilevel.methods import METHODS
from raybilevel.problems.ridge import Ridge
from raybilevel.space import Parameter, Space
from raybilevel.tune._domains import to_param_space

PACKAGES = {
    "optuna": "optuna", "optuna-gp": "optuna", "hyperopt": "hyperopt", "bayesopt": "bayes_opt", "bohb": "hpbandster",
    "ax": "ax",
}  # fmt: skip


def setting(groups: int = 2, trainings: float | None = 6, **changes: Any) -> Setting:
    from ray import tune

    problem = Ridge(groups)
    param_space = {"decay": {f"g{g}": tune.loguniform(1e-4, 10.0) for g in range(groups)}}
    return replace(Setting(problem, problem.space, param_space, 60, 0, trainings, 2), **changes)


def test_raybilevel_s_own_methods_are_there() -> None:
    assert set(OWN_METHODS.values()) <= set(METHODS)


@pytest.mark.parametrize("name", sorted(PACKAGES))
@pytest.mark.filterwarnings("ignore")  # of the packages themselves
def test_a_searcher_works_or_says_why_not(name: str) -> None:
    if importlib.util.find_spec(PACKAGES[name]) is None:
        with pytest.raises(UnavailableError, match=rf"(?i)install|{PACKAGES[name]}"):
            probe_parts(parse(name), setting())
    elif name == "ax":
        with contextlib.suppress(UnavailableError):  # newer ones are broken with Ray
            probe_parts(parse(name), setting())
    else:
        probe_parts(parse(name), setting())


def test_settings_reach_the_searcher_and_wrong_ones_are_refused() -> None:
    pytest.importorskip("optuna", reason="the extra `compare` is not installed")
    assert make_searcher("optuna", setting(searcher={"n_startup_trials": 3})) is not None
    with pytest.raises(ConfigError, match=r"searcher 'optuna'.*speed"):
        make_searcher("optuna", setting(searcher={"speed": 3}))
    with pytest.raises(ConfigError, match=r"scheduler 'asha'.*speed"):
        make_scheduler("asha", setting(scheduler={"speed": 3}))


def test_a_grid_has_about_as_many_points_as_the_budget_pays_for() -> None:
    log = Parameter(("a",), 1e-4, 1.0, log=True)
    values = grid(Space((log, Parameter(("b",), 0.0, 4.0))), trainings=10)
    assert values[("a",)] == pytest.approx([1e-4, 1e-2, 1.0])
    assert values[("b",)] == pytest.approx([0.0, 2.0, 4.0])
    with pytest.raises(UnavailableError, match="13 hyperparameters make 8,192"):
        grid(Space(tuple(Parameter((f"p{i}",), 0.0, 1.0) for i in range(13))), trainings=10)


def test_a_grid_has_the_values_of_choices_and_whole_numbers() -> None:
    kinds = Parameter.of(("kind",), "choice", ["a", {"b": 1}, None])
    layers, width = Parameter.of(("layers",), "randint", [1, 3]), Parameter.of(("width",), "lograndint", [1, 1001])
    values = grid(Space((kinds, layers, width)), trainings=27)
    assert values == {("kind",): ["a", {"b": 1}, None], ("layers",): [1, 2], ("width",): [1, 32, 1000]}
    assert all(isinstance(value, int) for path in (("layers",), ("width",)) for value in values[path])


@pytest.mark.parametrize(("name", "words"), [("grid", "grid cannot"), ("pbt", "pbt cannot"), ("optuna", "optuna can")])
def test_lists_and_alternatives_are_for_those_that_can_search_them(name: str, words: str) -> None:
    rate = {"uniform": [0.0, 1.0]}
    for tree in ({"rates": [rate, rate]}, {"optimizer": {"choice": [{"name": "sgd", "rate": rate}, {"name": "adam"}]}}):
        space, constants = read_space(tree)
        assert space is not None
        there = setting(space=space, param_space=to_param_space(space, constants))
        with pytest.raises(UnavailableError, match=words):
            probe_parts(parse(name), there)
        for able in ("random", "raybilevel", "asha"):
            probe_parts(parse(able), there)


def test_pb2_searches_ranges() -> None:
    with pytest.raises(UnavailableError, match="no choices or few whole numbers"):
        probe_parts(parse("pb2"), setting(space=Space((Parameter.of(("layers",), "randint", [1, 3]),))))


def test_bounds_are_nested_as_the_space_is() -> None:
    assert bounds(Ridge(2).space) == {"decay": {"g0": [1e-4, 10.0], "g1": [1e-4, 10.0]}}


def test_how_many_trials_a_method_may_begin() -> None:
    assert samples_of(Parts("random"), setting(trainings=6.5)) == 6
    assert samples_of(Parts("random", "pbt"), setting()) == 6
    assert samples_of(Parts("random", "median-stopping"), setting()) == 12
    assert samples_of(Parts("optuna", "asha"), setting()) == 360
    assert samples_of(Parts("optuna"), setting(trainings=None)) > 1000
    assert samples_of(Parts("random", "pbt"), setting(trainings=None)) == 4


@pytest.mark.filterwarnings("ignore")  # of the package itself
def test_a_searcher_without_logarithms_is_given_the_unit_cube() -> None:
    pytest.importorskip("bayes_opt", reason="the extra `compare` is not installed")
    given = setting()
    timed = TimedSearcher(make_searcher("bayesopt", given), given.space)
    assert timed.set_search_properties("upper_loss", "min", dict(given.param_space))
    drawn = [timed.suggest(f"trial{i}") for i in range(8)]
    logs = [math.log10(d["decay"]["g0"]) for d in drawn if isinstance(d, dict)]
    assert all(-4 <= value <= 1 for value in logs)
    assert sum(value < -1.5 for value in logs) >= 2  # on the linear scale that is one in three hundred
    assert timed.overhead.calls == 9
