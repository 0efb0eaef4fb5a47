"""Spaces with lists, functions, grids and conditions."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from ray import tune

from raybilevel._dependent import Dependent, resolved
from raybilevel.errors import SpaceError
from raybilevel.space import Space, check_points
from raybilevel.tune._domains import split_param_space

OPTIMIZERS = {
    "optimizer": tune.choice(
        [
            {"kind": "sgd", "lr": tune.loguniform(1e-3, 1), "momentum": tune.uniform(0, 0.9)},
            {
                "kind": "adam",
                "lr": tune.loguniform(1e-3, 1),
                "warm": tune.choice([{"steps": tune.randint(1, 4)}, None]),
            },
            None,
        ]
    ),
    "decay": tune.loguniform(1e-6, 1),
}


def points(space: Space, count: int = 40) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.rand(count, space.dimension, generator=generator, dtype=torch.double)
    return [space.rounded(point) for point in drawn]


def values(space: Space, count: int = 40) -> list[dict[str, Any]]:
    return [space.to_config(point) for point in points(space, count)]


def test_lists_and_tuples_have_domains_and_constants_in_them() -> None:
    space, constants = split_param_space(
        {
            "weights": [tune.uniform(0, 1)] * 30,
            "layers": (tune.uniform(0, 1), 5, {"width": tune.randint(1, 4), "kind": "dense"}),
            "shape": (3, 3),
            "deep": {"sizes": [1, 2], "rate": tune.uniform(1, 2)},
        }
    )
    assert space.dimension == 33 and space.names[:2] == ("weights/0", "weights/1")
    assert constants == {"shape": (3, 3), "deep": {"sizes": [1, 2]}}
    for config in values(space, 5):
        assert len(config["weights"]) == 30 and isinstance(config["weights"], list)
        first, five, layer = config["layers"]
        assert isinstance(config["layers"], tuple) and 0 <= first <= 1 and five == 5
        assert layer["kind"] == "dense" and layer["width"] in (1, 2, 3)
        assert set(config["deep"]) == {"rate"}


def test_every_point_of_a_conditional_space_comes_back_from_its_config() -> None:
    space, _ = split_param_space(OPTIMIZERS)
    for point in points(space):
        config = space.to_config(point)
        torch.testing.assert_close(space.encode(config), point, rtol=0, atol=1e-12)
        assert space.contains(config)
        check_points([config], space)


def test_a_part_of_a_space_is_there_with_its_choice_only() -> None:
    space, _ = split_param_space(OPTIMIZERS)
    found = {
        "none" if c["optimizer"] is None else c["optimizer"]["kind"]: c["optimizer"]
        for c in values(space)
        if len(c) == 2
    }
    assert found["none"] is None
    assert set(found["sgd"]) == {"kind", "lr", "momentum"} and set(found["adam"]) == {"kind", "lr", "warm"}
    assert [p.name for p in space.parameters] == [
        "optimizer", "optimizer/lr", "optimizer/momentum", "optimizer/warm", "optimizer/warm/steps", "decay"
    ]  # fmt: skip
    lr, steps = space.parameters[1], space.parameters[4]
    assert lr.when == (((0, 0),), ((0, 1),))  # in common
    assert steps.when == (((0, 1), (3, 0)),)


def test_what_is_not_active_takes_no_part() -> None:
    space, _ = split_param_space(OPTIMIZERS)
    none = torch.full((space.dimension,), 0.9, dtype=torch.double)
    none[0] = space.parameters[0].levels[2]
    other = none.clone()
    other[1:5] = 0.1
    assert torch.equal(space.rounded(none), space.rounded(other))
    gradient = space.known([1.0] * space.dimension, space.rounded(none))
    assert [g == g for g in gradient] == [False] * 5 + [True]
    decoded = space.decode(space.rounded(none))
    assert decoded["optimizer"] is None and decoded["decay"].dim() == 0


def test_points_to_evaluate_of_a_conditional_space_are_checked_by_name() -> None:
    space, _ = split_param_space(OPTIMIZERS)
    check_points([{"optimizer": {"lr": 0.1, "momentum": 0.5}, "decay": 0.1}, {"optimizer": None, "decay": 1e-3}], space)
    for point, words in (
        ({"optimizer": {"kind": "rms", "lr": 0.1}, "decay": 0.1}, r"optimizer: expected one of its 3 alternatives"),
        ({"optimizer": {"lr": 0.1, "momentun": 0.5}, "decay": 0.1}, "optimizer/momentun not in the space"),
        ({"decay": 0.1}, "optimizer: expected one of its 3 alternatives, got nothing"),
        ({}, "optimizer: expected one of its 3 alternatives, got nothing"),
    ):
        with pytest.raises(SpaceError, match=rf"points_to_evaluate\[0\].*{words}"):
            check_points([point], space)


def test_points_of_representatives_meet_every_part() -> None:
    space, _ = split_param_space(OPTIMIZERS)
    met = torch.stack([space.active(point) for point in space.representatives()]).any(0)
    assert bool(met.all())
    kinds = [space.to_config(point)["optimizer"] for point in space.representatives()]
    assert None in kinds


def test_functions_are_given_the_config_in_either_form_and_each_other_s_values() -> None:
    space, constants = split_param_space(
        {
            "x": tune.uniform(1, 2),
            "last": tune.sample_from(lambda config: config["half"] + config["constant"]),
            "half": tune.sample_from(lambda config: config["x"] / 2),
            "old": tune.sample_from(lambda spec: spec.config.x * 2),
            "text": {"eval": "spec.config.x * 3"},
            "constant": 10,
            "list": [tune.sample_from(lambda config: config["x"])],
        }
    )
    assert constants == {"constant": 10}
    for config in values(space, 4):
        x = config["x"]
        assert config["half"] == x / 2 and config["last"] == x / 2 + 10
        assert config["old"] == 2 * x and config["text"] == 3 * x and config["list"] == [x]


def test_the_form_of_a_function_is_found_out_once() -> None:
    given: list[set[str]] = []

    def twice(spec: Any) -> float:
        given.append(set(spec))
        return 2.0 * spec.config.deep.items

    space, _ = split_param_space({"deep": {"items": tune.uniform(1, 2)}, "y": tune.sample_from(twice)})
    assert all(config["y"] == 2 * config["deep"]["items"] for config in values(space, 3))
    assert given == [{"deep"}, {"config"}, {"config"}, {"config"}]


def test_functions_that_draw_give_a_config_the_same_value_wherever_it_is_made() -> None:
    space, _ = split_param_space(
        {"x": tune.uniform(0, 1), "n": tune.sample_from(lambda config: (np.random.rand(), random.random()))}
    )
    one, other = points(space, 2)
    before = np.random.get_state()[1].tolist(), random.getstate()
    assert space.to_config(one) == space.to_config(one)
    assert space.to_config(one)["n"] != space.to_config(other)["n"]
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before


def test_the_last_digit_of_a_value_does_not_change_what_is_drawn() -> None:
    one, near, other = (
        resolved({"x": x, "n": Dependent(lambda config: random.random())}, {})
        for x in (0.3, math.nextafter(0.3, 1), 0.3001)
    )
    assert one["n"] == near["n"] != other["n"] and one["x"] != near["x"]


def test_a_function_that_fails_is_named() -> None:
    space, _ = split_param_space({"x": tune.uniform(0, 1), "y": {"z": tune.sample_from(lambda config: config["w"])}})
    with pytest.raises(SpaceError, match="y/z: its function raised KeyError: 'w'"):
        space.to_config(points(space, 1)[0])


def test_cells_of_a_grid_take_turns() -> None:
    space, _ = split_param_space({"x": tune.uniform(0, 1), "a": tune.grid_search([3, 1]), "b": tune.grid_search("uvw")})
    assert space.cells == 6
    asked: list[list[float]] = []
    for point in points(space, 18):
        asked.append(space.rounded(space.in_cell(point, asked)).tolist())
    cells = [(c["a"], c["b"]) for c in (space.to_config(torch.tensor(unit).double()) for unit in asked)]
    assert sorted(cells) == sorted([(a, b) for a in (1, 3) for b in "uvw"] * 3)
    assert {c[0] for c in cells[:6]} == {1, 3}


def network(trial: Any) -> dict[str, Any]:
    kind = trial.suggest_categorical("kind", ["sgd", "adam", "lbfgs"])
    trial.suggest_categorical("activation", ["relu", "tanh"])
    depth = trial.suggest_int("depth", 1, 3)
    for layer in range(depth):
        trial.suggest_int(f"units{layer}", 8, 128, log=True)
    if kind == "sgd":
        trial.suggest_float("options/momentum", 0, 0.9)
    rate = trial.suggest_float("rate", 1e-4, 1, log=True)
    if kind == "adam" and depth == 3:
        trial.suggest_float("epsilon", 1e-9, 1e-6, log=True)
    return {"half": rate / 2, "fixed": 7, "named": f"{kind}!"}


def test_a_define_by_run_function_becomes_a_tree() -> None:
    space, constants = split_param_space(network)
    assert constants == {}
    assert {p.name for p in space.parameters if not p.when} == {"kind", "activation", "depth", "units0", "rate"}
    met = set()
    for config in values(space, 200):
        wanted = {"kind", "activation", "depth", "rate", "half", "named", "fixed"}
        wanted |= {f"units{layer}" for layer in range(config["depth"])}
        wanted |= {"options"} if config["kind"] == "sgd" else set()
        wanted |= {"epsilon"} if config["kind"] == "adam" and config["depth"] == 3 else set()
        assert set(config) == wanted
        assert config["half"] == config["rate"] / 2 and config["named"] == config["kind"] + "!"
        met |= wanted
    assert "epsilon" in met and "options" in met


def test_bounds_that_depend_on_a_choice_are_hyperparameters_of_their_own() -> None:
    def function(trial: Any) -> None:
        kind = trial.suggest_categorical("kind", ["a", "b"])
        trial.suggest_float("rate", 0, 1 if kind == "a" else 10)

    space, _ = split_param_space(function)
    assert [(p.name, p.high, p.when) for p in space.parameters[1:]] == [
        ("rate", 1.0, (((0, 0),),)), ("rate", 10.0, (((0, 1),),))
    ]  # fmt: skip


def test_what_a_define_by_run_function_returns_follows_every_value() -> None:
    def function(trial: Any) -> dict[str, Any]:
        n, rate = trial.suggest_int("n", 1, 3), trial.suggest_float("rate", 0, 1)
        return {"two": n == 2, "big": rate > 0.6, "same": 7}

    space, _ = split_param_space(function)
    for config in values(space):
        assert config["two"] == (config["n"] == 2) and config["big"] == (config["rate"] > 0.6)
        assert config["same"] == 7

    def sometimes(trial: Any) -> dict[str, Any]:
        return {"m": 1} if trial.suggest_int("n", 1, 3) == 2 else {}

    with pytest.raises(SpaceError, match="m: sometimes returns it at some values only"):
        split_param_space(sometimes)


def test_what_has_one_value_only_is_a_constant_where_it_is_asked_for() -> None:
    def function(trial: Any) -> dict[str, Any]:
        layers, width = trial.suggest_int("layers", 2, 2), trial.suggest_float("deep/width", 0.5, 0.5)
        if trial.suggest_categorical("kind", ["a", "b"]) == "b":
            trial.suggest_categorical("only", ["x"])
            trial.suggest_float("far", 0.5, 1, step=2)
        return {"sum": layers + width}

    space, _ = split_param_space(function)
    assert space.names == ("kind",)
    base = {"layers": 2, "deep": {"width": 0.5}, "sum": 2.5}
    assert [space.to_config(torch.tensor([unit])) for unit in (0.25, 0.75)] == [
        {**base, "kind": "a"}, {**base, "kind": "b", "only": "x", "far": 0.5}
    ]  # fmt: skip


def test_a_hyperparameter_may_depend_on_a_choice_that_comes_after_it() -> None:
    def function(trial: Any) -> None:
        if trial.suggest_categorical("a", ["p", "q"]) == "p" or trial.suggest_categorical("b", ["r", "s"]) == "r":
            trial.suggest_float("x", 0, 1)

    space, _ = split_param_space(function)
    config = {"a": "q", "b": "r", "x": 0.3}
    assert space.names == ("a", "x", "b") and space.part(config) == config
    assert space.to_config(space.encode(config)) == config
    assert space.to_unit_gradient(config, {"a": 0.0, "x": 2.0, "b": 0.0})[1] == 2.0


def test_what_a_define_by_run_function_may_not_do_is_named() -> None:
    def by_a_value(trial: Any) -> None:
        trial.suggest_float("b", 0, 1 + trial.suggest_float("a", 0, 1))

    def twice(trial: Any) -> None:
        trial.suggest_float("a", 0, 1)
        trial.suggest_float("a", 0, 2)

    def a_list(trial: Any) -> Any:
        trial.suggest_float("a", 0, 1)
        return [1]

    def too_many(trial: Any) -> None:
        for bit in range(20):
            if trial.suggest_categorical(f"a{bit}", [0, 1]):
                trial.suggest_float(f"b{bit}", 0, 1)

    for function, words in (
        (by_a_value, "a: what by_a_value asks for, or a bound of it, depends on this value"),
        (twice, "a: the define-by-run function asks for it twice"),
        (a_list, "a_list must return a dict with texts as keys, or None"),
        (too_many, "too_many asks for different hyperparameters after too many combinations"),
    ):
        with pytest.raises(SpaceError, match=words):
            split_param_space(function)
