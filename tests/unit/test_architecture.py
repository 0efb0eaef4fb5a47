"""Architecture: the cell by hand, its hypergradient, and that a descent finds a better one than chance."""

from __future__ import annotations

import os
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from torch.nn.utils import parameters_to_vector

from raybilevel._config.experiment import read_config
from raybilevel._lower.levels import Levels
from raybilevel._lower.variables import ModuleVariables, weights_of
from raybilevel.errors import ConfigError
from raybilevel.hypergradient import Unrolled
from raybilevel.hypergradient._descent import BilevelDescent
from raybilevel.methods._hypergradient import HypergradientDescent
from raybilevel.problems.architecture import (
    OPERATIONS,
    Architecture,
    Cell,
    MixingWeights,
    edges,
    genotype,
    random_genotype,
)

DATA = os.environ.get("RAYBILEVEL_TEST_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="RAYBILEVEL_TEST_DATA does not name a folder with the data sets")


def tiny(**options: Any) -> Architecture:
    given = {"train": 40, "validation": 30, "nodes": 2, "channels": 2, "epochs": 2, "search_epochs": 2, "batch": 20}
    return Architecture(**{**given, **options})


def test_a_cell_by_hand() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4, 6, 6)
    names = ("convolution_3", "max_pool", "average_pool")  # edges 0-1, 0-2, 1-2
    cell = Cell(4, 2, [(name,) for name in names])
    weights = [torch.tensor([w]) for w in (0.5, 2.0, 1.0)]
    first, second, third = (few[0] for few in cell.operations)  # type: ignore[union-attr]
    node1 = 0.5 * first(x)
    node2 = 2 * second(x) + third(node1)
    torch.testing.assert_close(cell(x, weights), (node1 + node2) / 2)
    assert edges(3) == [(0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3)]


@pytest.mark.parametrize(("options", "parts"), [({}, 1), ({"grid": 2}, 4)])
def test_the_last_layer_sees_means_of_parts_of_the_image(options: dict[str, Any], parts: int) -> None:
    model = Architecture(channels=3, **options).model()
    assert model.get_submodule("last").in_features == 3 * parts
    assert model(torch.randn(2, 1, 8, 8)).shape == (2, 10)


def test_operations_keep_the_shape_and_all_but_skip_the_size() -> None:
    x = 5 * torch.randn(2, 3, 7, 7, generator=torch.Generator().manual_seed(0))
    for name, make in OPERATIONS.items():
        found = make(3)(x)
        assert found.shape == x.shape
        expected = x if name == "skip" else torch.ones(())
        # 1e-3: the constant that keeps a group's deviation from 0
        torch.testing.assert_close(found.square().mean(), expected.square().mean(), rtol=1e-2, atol=1e-3)


def test_a_mixture_with_all_weight_on_one_operation_is_that_architecture() -> None:
    problem = tiny()
    torch.manual_seed(0)
    mixed, names = problem.model(), ("convolution_1", "skip", "convolution_3")
    alone = problem.network([(name,) for name in names])
    kept = {}
    for key, value in mixed.state_dict().items():
        parts = key.split(".")
        if parts[0] == "cells":
            edge, number = int(parts[3]), int(parts[4])
            if tuple(OPERATIONS)[number] != names[edge]:
                continue
            parts[4] = "0"
        kept[".".join(parts)] = value
    alone.load_state_dict(kept)
    weights = [torch.tensor([float(name == chosen) for name in OPERATIONS]) for chosen in names]
    x = problem.splits["upper"][0]
    assert x.shape == (30, 1, 8, 8) and x.min() == -1 and x.max() == 1
    torch.testing.assert_close(mixed(x, weights), alone(x), rtol=1e-4, atol=1e-5)


def test_hypergradient_of_one_step_against_central_differences() -> None:
    problem = tiny(batch=40)
    problem.dtype = torch.double
    torch.manual_seed(0)
    module = problem.upper_variables().double()
    functions = Levels(problem, problem.model().double(), ModuleVariables(module, {}))
    x, y = parameters_to_vector(module.parameters()).detach(), weights_of(problem.model().double())

    def after_one_step(x: torch.Tensor) -> float:
        return functions.upper(x, y - 0.05 * functions.lower(x, y).in_y).value

    found = Unrolled(steps=1, rate=0.05)(functions, x, y).gradient
    for number in (0, 7, 14):
        step = torch.zeros_like(x)
        step[number] = 1e-5
        # 1e-5: the differences' truncation
        expected = (after_one_step(x + step) - after_one_step(x - step)) / 2e-5
        assert found[number].item() == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_genotypes_and_what_they_cost() -> None:
    problem = tiny()
    mixing = problem.upper_variables()
    assert isinstance(mixing, MixingWeights)
    with torch.no_grad():
        mixing.logits.zero_()
        mixing.logits[torch.arange(3), torch.tensor([4, 0, 3])] = 1.0
    names = genotype(mixing)
    assert names == ("convolution_3", "skip", "convolution_1")
    # 3x3 from 1 to 2 channels on 64 pixels; then 9 + 1 of 2 x 2 channels on 64 + 16 pixels
    assert problem.multiply_adds([(name,) for name in names]) == 9 * 2 * 64 + 10 * 4 * 80
    generator = torch.Generator().manual_seed(0)
    drawn = {name for _ in range(50) for name in random_genotype(2, generator)}
    assert drawn == set(OPERATIONS)


def test_a_training_follows_its_seed_and_leaves_the_global_one() -> None:
    problem, names = tiny(), ("convolution_3", "skip", "max_pool")
    state = torch.get_rng_state()
    first = problem.trained(names)
    assert torch.equal(torch.get_rng_state(), state)
    assert problem.trained(names) == first != problem.trained(names, seed=1)
    assert 0 <= first["test_accuracy"] <= 1 and first["validation_loss"] > 0


def test_a_descent_reports_the_architecture_trained_anew() -> None:
    problem = tiny()
    method = HypergradientDescent(
        steps=2, rate=0.1, estimator="unrolled", estimator_settings={"steps": 1, "rate": 0.05}
    )
    descent = BilevelDescent(problem, {"start": 0.0}, method)
    while not descent.finished:
        descent.run_step()
    found = descent.conclude()
    chosen = genotype(descent.levels.hyperparameters(descent.best[1])["upper"])
    again = problem.trained(chosen)
    assert {name: found[name] for name in again} == again
    assert found["convolutions"] == sum("convolution" in name for name in chosen)


@pytest.mark.parametrize(
    "options", [{"source": "letters"}, {"source": "mnist"}, {"train": 1790}, {"nodes": 0}, {"decay": 0.0}]
)
def test_wrong_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Architecture(**options)


@needs_data
def test_images_are_averaged() -> None:
    problem = Architecture(DATA, "cifar10", train=5, validation=3, test=4)
    assert [tuple(problem.splits[name][0].shape) for name in ("lower", "upper", "test")] == [
        (5, 3, 16, 16),
        (3, 3, 16, 16),
        (4, 3, 16, 16),
    ]
    white = torch.full((1, 28, 28), 255, dtype=torch.uint8)
    assert torch.equal(problem.inputs(white), torch.ones(1, 1, 14, 14))


@pytest.mark.slow
def test_a_descent_beats_random_architectures_on_digits() -> None:
    """Of the mean of a few; the best of many random ones is as good (docs/explanation/families.md)."""
    config = read_config(Path(__file__).parents[2] / "configs" / "architecture.yaml")
    problem = Architecture()
    descent = BilevelDescent(problem, {"start": 0.0}, HypergradientDescent(**config.search.settings))
    while not descent.finished:
        descent.run_step()
    generator = torch.Generator().manual_seed(0)
    others = [problem.trained(random_genotype(3, generator))["test_accuracy"] for _ in range(5)]
    assert descent.conclude()["test_accuracy"] > mean(others)
