"""From a config to what is run."""

from __future__ import annotations

from typing import Any

import pytest

from raybilevel import problems
from raybilevel._config import plan as plans
from raybilevel._config.experiment import ExperimentConfig
from raybilevel._config.plan import Machine, resolve
from raybilevel.errors import ConfigError, RaybilevelError, SpaceError
from raybilevel.methods._default import Default
from raybilevel.methods._hypergradient import HypergradientDescent
from raybilevel.space import STARTS, Parameter
from tests.tiny_problems import Parabola

SPACE = {"x": {"a": {"loguniform": [1e-4, 1e2]}, "kept": 3}}
SMALL = Machine(cpus=2, gpus=0, memory=8e9)


@pytest.fixture(autouse=True)
def parabola(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(problems.PROBLEMS, "parabola", Parabola)


def config(space: Any = SPACE, **changes: Any) -> ExperimentConfig:
    raw = {"problem": "parabola", "space": space, "search": {"trainings": 3}}
    return ExperimentConfig.model_validate({**raw, **changes})


def test_a_plan_holds_what_the_config_says() -> None:
    point = {"x": {"a": 0.5}}
    search = {
        "trainings": 3, "seed": 7, "max_concurrent": 2, "points_to_evaluate": [point], "epoch_time_limit": 4,
        "step_time_limit": 5, "max_failures": -1, "settings": {"decrease": 0.1}, "constraints": {"score": ">= -1"},
    }  # fmt: skip
    plan = resolve(config(search=search, resources={"lower": {"cpu": 2}, "upper": {"disk": 1}}), machine=SMALL)
    assert isinstance(plan.problem, Parabola) and plan.method == Default(decrease=0.1)
    assert plan.config.search.method == "default"  # as it is kept with the run
    assert plan.space.parameters == (Parameter(("x", "a"), 1e-4, 1e2, log=True),)
    assert plan.constants == {"x": {"kept": 3}}
    assert plan.points == (point,) and plan.constraints == {"score": ">= -1"}
    assert plan.training.bundles == ({"CPU": 2},) and plan.step == {"disk": 1}
    assert (plan.seed, plan.trainings, plan.max_concurrent) == (7, 3, 2)
    assert (plan.epoch_time_limit, plan.step_time_limit, plan.max_failures) == (4, 5, -1)
    assert plan.upper_level == "1 hyperparameters"


def test_without_a_box_the_starts_of_descents_are_searched() -> None:
    search = {"trainings": 1}
    raw = {"problem": "treatment_effects", "options": {"units": 50}, "search": search, "space": {"constant": 1}}
    plan = resolve(ExperimentConfig.model_validate(raw))
    assert plan.space == STARTS and plan.constants == {"constant": 1}
    assert isinstance(plan.method, HypergradientDescent)
    assert "upper-level variables" in plan.upper_level
    with pytest.raises(SpaceError, match="method 'paper' needs a hyperparameter to search"):
        resolve(ExperimentConfig.model_validate({**raw, "search": {**search, "method": "paper"}}))


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        ({"problem": "parabel"}, ["unknown problem 'parabel'"]),
        ({"space": {**SPACE, "b": {"uniform": [0, 1]}}}, ["b: nothing in Parabola reads it"]),
        (
            {"problem": "parabel", "search": {"trainings": 1, "method": "asha"}, "resources": {"lower": {"cpu": 3}}},
            ["unknown problem 'parabel'", "unknown method 'asha'", "resources.lower: a training asks for CPU: 3"],
        ),
        (
            {
                "resources": {"lower": {"bundles": [{"CPU": 2}, {"CPU": 2}]}, "upper": {"gpu": 0.5}},
                "search": {"trainings": 1, "points_to_evaluate": [{"x": {"a": 1.0}}, {"x": {"a": 1e3}}]},
            },
            [
                "resources.lower: a training asks for CPU: 4, this machine has 2",
                "resources.upper: an upper-level step asks for GPU: 0.5, this machine has 0",
                "search.points_to_evaluate[1]: x/a = 1000.0 is outside [0.0001, 100.0]",
            ],
        ),
        (
            {"search": {"trainings": 1, "points_to_evaluate": [{"x": {}}]}},
            ["search.points_to_evaluate[0]: x not in the space"],
        ),
        ({"space": {"x": {"b": 1.0}, "c": {"uniform": [0, 1]}}}, ["space: Parabola reads the hyperparameter 'x/a'"]),
        (
            {"space": {"x": {"uniform": [0, 1]}}},
            ["Parabola.lower_loss raised IndexError"],
        ),
        (
            {"search": {"trainings": 1, "method": "paper", "constraints": {"score": ">= -1"}}},
            ["constraints: Paper takes none"],
        ),
        (
            {"resources": {"upper": {"memory": 1e15}}},
            ["resources.upper: an upper-level step asks for memory: 1e+15, this machine has 8e+09; ask for less"],
        ),
        ({"options": {"device": "cuda"}}, ["options.device: 'cuda', and this machine has no GPU"]),
    ],
)
def test_everything_that_is_wrong_is_said_at_once(changes: dict[str, Any], lines: list[str]) -> None:
    with pytest.raises(RaybilevelError) as caught:
        resolve(config(**changes), machine=SMALL)
    said = str(caught.value).splitlines()
    assert len(said) == len(lines)
    assert all(line.startswith(expected) for line, expected in zip(said, lines, strict=True)), said


def test_of_a_cluster_nothing_is_known() -> None:
    asked = config(resources={"lower": {"cpu": 99}})
    assert resolve(asked).training.first == {"CPU": 99}
    with pytest.raises(ConfigError, match="ask for less, or join a cluster by --address"):
        resolve(asked, machine=SMALL)


def test_the_problem_is_made_and_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[Any] = []

    def check(problem: Any, space: Any, constants: Any, method: Any) -> Any:
        checked.append((problem, space, constants, method))
        return space

    monkeypatch.setattr(plans, "check_search", check)
    plan = resolve(config())
    assert checked == [(plan.problem, plan.space, plan.constants, plan.method)]
