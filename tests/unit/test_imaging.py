"""Image regularisers and weighted examples: their formulas, and that tuning them helps, on small pieces of the data."""

from __future__ import annotations

import math
import os
import pickle

import pytest
import torch
from torch.nn.utils import parameters_to_vector

from raybilevel._lower.levels import Levels
from raybilevel._lower.variables import ModuleVariables, weights_of
from raybilevel.errors import ConfigError, DataError
from raybilevel.hypergradient import Implicit, LinearSystem, MinimalResidual, Selection, solve_lower
from raybilevel.hypergradient._descent import BilevelDescent
from raybilevel.methods._hypergradient import HypergradientDescent
from raybilevel.problems import _datasets as datasets
from raybilevel.problems.imaging import FieldsOfExperts, RegularisationParameters, psnr
from raybilevel.problems.weighting import NoisyLabels
from raybilevel.space import Parameter, Space

DATA = os.environ.get("RAYBILEVEL_TEST_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="RAYBILEVEL_TEST_DATA does not name a folder with the data sets")


def inpainting(**options: object) -> FieldsOfExperts:
    return FieldsOfExperts(DATA, task="inpainting", **options)  # type: ignore[arg-type]


@needs_data
def test_fields_of_experts_by_hand() -> None:
    problem = inpainting(filters=1, filter_size=1, smoothing=0.5)
    module = problem.upper_variables().to(problem.dtype)
    with torch.no_grad():
        module.filters.fill_(2.0)
        module.log_weights.fill_(math.log(3.0))
    images = torch.tensor([[[[0.0, 1.0]]]], dtype=torch.double)
    given = {"upper": module}
    # 3 (sqrt(0 + 1/4) + sqrt(4 + 1/4))
    assert problem.regulariser(images, given).item() == pytest.approx(3 * (0.5 + math.sqrt(4.25)))
    problem.expert = "lorentzian"
    assert problem.regulariser(images, given).item() == pytest.approx(3 * 0.25 * math.log1p(4 / 0.25))
    tv = RegularisationParameters(DATA, smoothing=0.5)
    square = torch.tensor([[[[0.0, 3.0], [4.0, 9.0]]]], dtype=torch.double)
    expected = 2 * math.sqrt(9 + 16 + 0.25) + 0.1 / 2 * (9 + 16 + 81)
    assert tv.regulariser(square, {"tv": 2.0, "tikhonov": 0.1}).item() == pytest.approx(expected)
    assert psnr(square, square + 0.1) == pytest.approx(20.0)


@needs_data
def test_hypergradient_of_filters_against_central_differences() -> None:
    problem = inpainting(filters=2, filter_size=3)
    torch.manual_seed(0)
    module = problem.upper_variables().to(problem.dtype)
    functions = Levels(problem, problem.model().to(problem.dtype), ModuleVariables(module, {}))
    x = parameters_to_vector(module.parameters()).detach()

    def solved(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        y = solve_lower(functions, x, y, 1e-6, limit=3000).y
        for _ in range(3):  # Newton's method, as differences need more than L-BFGS gives
            system = LinearSystem(functions.linearise(x, y).hessian, functions.lower(x, y).in_y, lambda v: v)
            y = y - MinimalResidual(1e-10, limit=5000).solve(system, None)[0].solution
        return y

    y = solved(x, torch.zeros(784, dtype=torch.double))
    selection = Selection("ritz_generalized_singular", "largest", 10)
    found = Implicit(MinimalResidual(1e-11, selection=selection))(functions, x, y)
    for number in (0, 7, 18):
        step = torch.zeros_like(x)
        step[number] = 1e-4
        above, below = (functions.upper(p, solved(p, y)).value for p in (x + step, x - step))
        # 1e-5: the differences' truncation
        assert found.gradient[number].item() == pytest.approx((above - below) / 2e-4, rel=1e-5, abs=1e-6)


@needs_data
def test_measurements_belong_to_their_image() -> None:
    both, second = inpainting(images=2), inpainting(images=1, first=1)
    for pair, one in zip(both.splits["train"], second.splits["train"], strict=True):
        assert torch.equal(pair[1:], one)
    three = inpainting(images=3)
    shards = [three.shard(number, 2) for number in range(2)]
    for whole, *parts in zip(three.splits["train"], *(s.splits["train"] for s in shards), strict=True):
        assert torch.equal(whole, torch.cat(parts))
    with pytest.raises(ConfigError, match="cannot be divided"):
        both.shard(0, 3)
    mask = both.splits["train"].mask
    assert 0.6 < 1 - mask.mean().item() < 0.8
    assert torch.equal(both.splits["train"].measured * (1 - mask), torch.zeros_like(mask))
    assert "splits" not in pickle.loads(pickle.dumps(both)).__dict__
    blurred = FieldsOfExperts(DATA, task="deblurring", filters=24, size=24)
    assert blurred.splits["train"].clean.shape == (1, 1, 24, 24)
    with pytest.raises(ConfigError, match="160 pixels"):
        _ = FieldsOfExperts(DATA, task="deblurring", size=161).splits
    # the transform's filters are orthonormal, without the constant one
    filters = blurred.upper_variables().filters.detach().flatten(1)
    torch.testing.assert_close(filters @ filters.T, torch.eye(24, dtype=torch.double), rtol=0, atol=1e-12)
    assert filters.sum(1).abs().max() < 1e-12
    for options in ({"task": "magic"}, {"expert": "magic"}, {"filter_size": 4}, {"removed": 1.0}, {"filters": 0}):
        with pytest.raises(ConfigError):
            FieldsOfExperts(DATA, **options)  # type: ignore[arg-type]


@pytest.mark.slow
@needs_data
def test_learned_filters_beat_the_first_ones_on_other_images() -> None:
    problem = inpainting(noise=0.1, test=2)
    settings = HypergradientDescent(steps=25, rate=0.1, lower="tolerance", lower_tolerance=1e-3)
    descent = BilevelDescent(problem, {"start": 0.0}, settings)
    descent.run_step()
    before = descent.metrics()
    first = descent.last["upper_loss"]
    while not descent.finished:
        descent.run_step()
    found = descent.conclude()
    assert found["upper_loss"] < first / 2 and found["test_psnr"] > before["test_psnr"] + 1


@pytest.mark.slow
@needs_data
def test_regularisation_parameters_by_a_descent_are_those_of_a_grid() -> None:
    problem = RegularisationParameters(DATA, noise=0.1)
    space = Space(tuple(Parameter((name,), 1e-3, 1.0, log=True) for name in ("tv", "tikhonov")))
    settings = HypergradientDescent(steps=50, rate=0.05, lower="tolerance", lower_tolerance=1e-4)
    centre = space.to_config(torch.full((2,), 0.5, dtype=torch.double))
    descent = BilevelDescent(problem, centre, settings, space)
    while not descent.finished:
        descent.run_step()
    found = descent.conclude()
    y = weights_of(descent.model)
    steps = torch.linspace(0, 1, 9, dtype=torch.double)
    values = []
    for point in torch.cartesian_prod(steps, steps):
        y = solve_lower(descent.levels, point, y, 1e-4).y
        values.append(descent.levels.upper(point, y).value)
    assert found["upper_loss"] <= min(values) * 1.005


@needs_data
def test_weights_tell_right_labels_from_wrong_ones() -> None:
    problem = NoisyLabels(DATA, train=600, validation=120, hidden=8)
    settings = HypergradientDescent(steps=15, rate=0.2, lower="tolerance", solver_settings={"tolerance": 1e-2})
    descent = BilevelDescent(problem, {"start": 0.0}, settings)
    while not descent.finished:
        descent.run_step()
    found = descent.conclude()
    assert found["ranking"] > 0.85
    assert found["uniform_accuracy"] + 0.02 < found["test_accuracy"] < found["oracle_accuracy"] + 0.02
    assert 0.4 < problem._right.double().mean() < 0.6
    with pytest.raises(ConfigError):
        NoisyLabels(DATA, wrong=1.0)


@needs_data
def test_graphs_and_crops_are_read_and_checked(tmp_path: object) -> None:
    train, test = datasets.bsds_crops(DATA or "")
    assert train.shape == (16, 160, 160) and test.shape == (8, 160, 160)
    graph = datasets.planetoid(DATA or "", "cora")
    assert graph.features.shape == (2708, 1433) and graph.features.sum() == 49_216
    assert graph.edges.shape == (5278, 2) and len(graph.train) == 140 and graph.labels.max() == 6
    with pytest.raises(DataError, match="unknown graph"):
        datasets.planetoid(DATA or "", "pubmed")
    with pytest.raises(DataError, match="bsds_crops"):
        datasets.bsds_crops(str(tmp_path))
