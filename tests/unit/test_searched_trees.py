"""Searches over spaces with lists, functions, grids and conditions."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from ray import tune
from torch import Tensor, nn

from raybilevel._lower.training import train
from raybilevel._models.discrete import all_active
from raybilevel.methods import Default
from raybilevel.problem import Level
from raybilevel.search import BilevelOptimizer, check_problem, observe, search
from raybilevel.tune._domains import split_param_space
from tests.tiny_problems import TwoWeights


class Aims(TwoWeights):
    """f = |y - aims|^2 with aims searched, and F = |y - 0.3|^2 + a cost of the optimizer, which is least, 0, with sgd
    at a momentum of 0.6."""

    epochs = 20

    def lower_loss(self, model: nn.Module, hyperparameters: Any, batch: Any) -> Tensor:
        return (model.weight[0] - torch.stack(hyperparameters["aims"])).square().sum()

    def upper_loss(self, model: nn.Module, hyperparameters: Any, batch: Any) -> Tensor:
        optimizer = hyperparameters["optimizer"]
        cost = 0.5 if optimizer is None else 0.2 + optimizer.get("epsilon", 0.0)
        if optimizer is not None and optimizer["name"] == "sgd":
            cost = (optimizer["momentum"] - 0.6) ** 2
        return (model.weight[0] - 0.3).square().sum() + cost

    def batches(self, level: Level, generator: torch.Generator | None) -> Iterator[Any]:
        yield (torch.zeros(1, dtype=torch.double),)


TREE = {
    "aims": [tune.uniform(-1, 1)] * 2,
    "optimizer": tune.choice(
        [
            {"name": "adam", "epsilon": tune.uniform(0, 1)},
            {"name": "sgd", "momentum": tune.uniform(0, 0.9)},
            None,
        ]
    ),
}


def test_gradients_of_lists_are_found_and_reported_by_place() -> None:
    space, _ = split_param_space(TREE)
    checked = check_problem(Aims(), space)
    # F itself has a slope in the last two.
    smooth = {"aims/0", "aims/1", "optimizer/epsilon", "optimizer/momentum"}
    assert {p.name for p in checked.parameters if p.smooth} == smooth
    unit = checked.rounded(torch.tensor([0.4, 0.9, 0.5, 0.3, 0.2], dtype=torch.double))
    config = checked.to_config(unit)
    trained, _ = train(Aims(), config)
    assert set(trained.lower_gradient["aims"]) == {"0", "1"}
    seen = observe(checked, config, trained)
    # sgd was trained.
    assert [g == g for g in seen.lower_gradient] == [True, True, False, False, True]


@pytest.mark.parametrize(
    "function",
    [
        tune.sample_from(lambda config: 2 * config["aims"][0]),
        tune.sample_from(lambda spec: 2 * spec.config.aims[0]),
        tune.sample_from(lambda config: random.random() + sum(dict(config)["aims"][:1])),
        {"eval": "2 * spec.config.aims[0]"},
    ],
)
def test_what_a_function_follows_is_searched_by_values(function: Any) -> None:
    space, _ = split_param_space({**TREE, "twice": function})
    before = random.getstate()
    checked = check_problem(Aims(), space)
    assert [p.name for p in checked.parameters if p.smooth] == ["aims/1", "optimizer/epsilon", "optimizer/momentum"]
    assert random.getstate() == before


def test_what_a_function_only_asks_for_keeps_its_gradient() -> None:
    def function(trial: Any) -> dict[str, Any]:
        aims = [trial.suggest_float(f"aim{number}", -1, 1) for number in range(2)]
        return {"aims": aims, "optimizer": None, "size": 2 ** trial.suggest_int("k", 1, 3)}

    class Separate(Aims):
        def lower_loss(self, model: nn.Module, hyperparameters: Any, batch: Any) -> Tensor:
            aims = torch.stack([hyperparameters["aim0"], hyperparameters["aim1"]])
            return (model.weight[0] - aims).square().sum() + 0 * hyperparameters["aims"][0]

    space, _ = split_param_space(function)
    assert space.names == ("aim0", "aim1", "k")
    # `aims` follows the first two.
    assert not any(check_problem(Separate(), space).smooth)
    without, _ = split_param_space(lambda trial: {**function(trial), "aims": [0.0, 0.0]})
    assert [p.name for p in check_problem(Separate(), without).parameters if p.smooth] == ["aim0", "aim1"]


def test_a_part_that_fails_is_found_before_anything_is_trained() -> None:
    space, _ = split_param_space({**TREE, "optimizer": tune.choice([{"name": "sgd", "mom": tune.uniform(0, 1)}, None])})
    with pytest.raises(Exception, match="momentum"):
        check_problem(Aims(), space)


def test_a_conditional_search_finds_the_best_part_and_leaves_the_others_at_rest() -> None:
    space, _ = split_param_space(TREE)
    optimizer = BilevelOptimizer(space, Default(), seed=0)
    search(Aims(), optimizer, cost=18)
    for training in optimizer.state.trainings:
        unit = torch.tensor(training.unit, dtype=torch.double)
        assert torch.equal(space.at_rest(unit)[0], unit)
    names = [optimizer.config_of(t)["optimizer"] for t in optimizer.state.trainings[:3]]
    assert {None if n is None else n["name"] for n in names} == {None, "adam", "sgd"}  # the start design
    best = optimizer.state.best
    assert best is not None and optimizer.config_of(best)["optimizer"]["name"] == "sgd"
    assert best.upper_loss < 0.05


def test_cells_of_a_grid_get_equal_shares_of_a_search() -> None:
    tree = {"aims": [tune.uniform(-1, 1)] * 2, "optimizer": tune.grid_search([None, "x"])}

    class Grid(Aims):
        def upper_loss(self, model: nn.Module, hyperparameters: Any, batch: Any) -> Tensor:
            cost = 0.0 if hyperparameters["optimizer"] is None else 1.0
            return (model.weight[0] - 0.3).square().sum() + cost

    optimizer = BilevelOptimizer(split_param_space(tree)[0], Default(), seed=0)
    search(Grid(), optimizer, cost=10)
    cells = [optimizer.config_of(t)["optimizer"] for t in optimizer.state.trainings]
    assert abs(cells.count(None) - cells.count("x")) <= 1
    lowest = [
        min(t.upper_loss for t, c in zip(optimizer.state.done, cells, strict=False) if c == cell)
        for cell in (None, "x")
    ]
    assert lowest == pytest.approx([0.0, 1.0], abs=0.1)


def test_without_conditions_all_is_active() -> None:
    points = torch.rand(3, 2)
    assert all_active(points)[0] is points and not all_active(points)[1].any()
