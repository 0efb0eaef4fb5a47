"""Few-shot tasks: their classes, the loss by hand, and that a learned initialisation helps with unseen classes."""

from __future__ import annotations

import math
import os
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.few_shot import joint, nearest
from raybilevel._lower.variables import weights_of
from raybilevel.errors import ConfigError
from raybilevel.hypergradient import LinearSystem, MinimalResidual, solve_lower
from raybilevel.hypergradient._descent import BilevelDescent
from raybilevel.methods._hypergradient import HypergradientDescent
from raybilevel.problems.few_shot import TURNS, FewShot, Initialisation

DATA = os.environ.get("RAYBILEVEL_TEST_DATA")
pytestmark = pytest.mark.skipif(not DATA, reason="RAYBILEVEL_TEST_DATA does not name a folder with the data sets")


def few_shot(**options: Any) -> FewShot:
    return FewShot(DATA, **options)


def test_tasks_to_test_are_of_other_digits() -> None:
    problem = few_shot(tasks=8, test_tasks=6, shots=2, queries=3)
    learn, test = problem.splits["learn"], problem.splits["test"]
    assert learn.x.shape == (8, 10, 14, 14) and test.query_x.shape == (6, 15, 14, 14)
    assert set((learn.classes // TURNS).flatten().tolist()) == {0, 1, 2, 3, 4}
    assert set((learn.classes % TURNS).flatten().tolist()) == {0, 1, 2, 3}
    # five ways of five digits, upright
    assert torch.equal(test.classes.sort(1).values, (TURNS * torch.arange(5, 10)).expand(6, 5))
    assert torch.equal(learn.y[0], torch.arange(5).repeat_interleave(2))
    same = few_shot(tasks=8, test_tasks=6, shots=2, queries=3).splits["learn"]
    assert torch.equal(same.x, learn.x)
    assert "splits" not in pickle.loads(pickle.dumps(problem)).__dict__
    for options in ({"ways": 6}, {"learn": [0, 11]}, {"nearness": 0.0}, {"learn": [1, 2, 3], "turns": False}):
        with pytest.raises(ConfigError):
            few_shot(**options)


def test_losses_at_the_start_and_of_known_deviations() -> None:
    problem = few_shot(tasks=3, test_tasks=2)
    model, start = problem.model(), problem.upper_variables()
    (batch,) = problem.batches("lower", None)
    given = {"upper": start}
    # a last layer of zeros: all five classes alike
    assert problem.lower_loss(model, given, batch).item() == pytest.approx(math.log(5), rel=1e-6)
    assert problem.upper_loss(model, given, batch).item() == pytest.approx(math.log(5), rel=1e-6)
    with torch.no_grad():
        model.get_parameter("bias")[0] = torch.tensor([2.0, 0.0, 0.0, 0.0, 0.0])
    # one task of three: CE is log(e^2 + 4) less 2 for a fifth of its examples
    shifted = math.log(math.exp(2) + 4) - 2 / 5
    expected = (2 * math.log(5) + shifted) / 3 + problem.nearness / 2 * 4 / 3
    assert problem.lower_loss(model, given, batch).item() == pytest.approx(expected, rel=1e-6)


def test_hypergradient_of_an_initialisation_against_central_differences() -> None:
    problem = few_shot(tasks=1, test_tasks=1, queries=2, nearness=1.0)
    problem.dtype = torch.float64
    method = HypergradientDescent(lower="tolerance", lower_tolerance=1e-9, solver_settings={"tolerance": 1e-10})
    descent = BilevelDescent(problem, {"start": 0.0}, method)
    x, functions = descent.x.detach().clone(), descent.levels
    x = x + 0.01 * torch.randn(len(x), generator=torch.Generator().manual_seed(0), dtype=x.dtype)

    def solved(x: Tensor, y: Tensor) -> Tensor:
        y = solve_lower(functions, x, y, 1e-6, limit=500).y
        for _ in range(3):  # Newton's method, as differences need more than L-BFGS gives
            system = LinearSystem(functions.linearise(x, y).hessian, functions.lower(x, y).in_y, lambda v: v)
            y = y - MinimalResidual(1e-12, limit=2000).solve(system, None)[0].solution
        return y

    y = solved(x, weights_of(descent.model))
    gradient = descent.estimator(functions, x, y).gradient
    assert gradient[:144].any()  # of the first convolution
    for number in (int(gradient[:144].abs().argmax()), 1000, len(x) - 700):
        step = torch.zeros_like(x)
        step[number] = 1e-5
        above, below = (functions.upper(p, solved(p, y)).value for p in (x + step, x - step))
        # 1e-6: the differences' truncation and rounding
        assert gradient[number].item() == pytest.approx((above - below) / 2e-5, rel=1e-6, abs=1e-9)


@pytest.mark.slow
def test_a_learned_initialisation_helps_with_new_digits() -> None:
    problem = few_shot(tasks=60, test_tasks=100)
    method = HypergradientDescent(
        steps=30, rate=0.01, lower="tolerance", lower_tolerance=1e-3, solver_settings={"tolerance": 0.03, "limit": 20}
    )
    descent = BilevelDescent(problem, {"start": 0.0}, method)
    start = descent.levels.hyperparameters(descent.x.detach().clone())["upper"]
    before = problem.accuracies(start, "test", problem.nearness).mean().item()
    assert before > 0.4 and nearest(problem.splits["test"]) > 0.4  # chance is 0.2
    while not descent.finished:
        descent.run_step()
    assert descent.conclude()["test_accuracy"] > before + 0.05


@pytest.mark.slow
def test_joint_training_tells_the_classes_apart() -> None:
    problem = few_shot(tasks=30, test_tasks=20)
    torch.manual_seed(0)
    start = Initialisation(5)
    trained = joint(start, problem.splits["learn"], 0)
    assert not torch.equal(trained.first.weight, start.first.weight) and not trained.head.weight.any()
    ours, theirs = (problem.accuracies(one, "learn", 0.01).mean() for one in (start, trained))
    assert theirs > ours + 0.05
