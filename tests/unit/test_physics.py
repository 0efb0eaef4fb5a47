"""Physics-informed networks, and what their weights are compared with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import physics
from raybilevel._lower.training import refit, train
from raybilevel.errors import ConfigError
from raybilevel.problems.physics import EQUATIONS, VISCOSITY, PhysicsInformed
from raybilevel.search import check_problem
from tests.problems_for_tests import vector


class Known(nn.Module):
    """The solution, times a factor, in the place of a network."""

    def __init__(self, problem: PhysicsInformed, factor: float = 1.0) -> None:
        super().__init__()
        self.problem, self.factor = problem, nn.Parameter(torch.tensor(factor, dtype=torch.double))

    def forward(self, points: Tensor) -> Tensor:
        return self.factor * self.problem.equation.solution(points)


def small(equation: str, **options: Any) -> PhysicsInformed:
    problem = PhysicsInformed(equation, **{"collocation": 40, "edge": 5, "width": 6, **options})
    problem.epochs = 1
    return problem


def ones(problem: PhysicsInformed) -> dict[str, Any]:
    return problem.space.to_config(torch.full((problem.space.dimension,), 0.5, dtype=torch.double))


@pytest.mark.parametrize("equation", EQUATIONS)
def test_the_solution_has_no_residual_and_keeps_the_edges(equation: str) -> None:
    problem = small(equation)
    points, model = problem.data["lower"], Known(problem)
    assert problem.residuals(model, points.inside).abs().max() < 1e-7
    assert all(loss < 1e-14 for loss in problem.losses(model, points).values())
    assert problem.evaluate(model)["relative_error"] == 0.0
    assert problem.evaluate(Known(problem, 1.1))["relative_error"] == pytest.approx(0.1)
    # f is the error of the measurements then, which is their noise.
    assert problem.lower_loss(model, ones(problem), points).item() == pytest.approx(0.01, rel=0.7)


def test_the_residual_of_burgers_is_that_of_a_known_function() -> None:
    class Product(nn.Module):
        def forward(self, points: Tensor) -> Tensor:
            return points[:, :1].pow(2) * points[:, 1:]

    x, t = 0.5, 0.25
    found = small("burgers").residuals(Product(), vector(x, t).reshape(1, 2)).item()
    # u = x^2 t: u_t + u u_x - nu u_xx
    assert found == pytest.approx(x**2 + x**2 * t * 2 * x * t - VISCOSITY * 2 * t)


@pytest.mark.parametrize("equation", EQUATIONS)
def test_every_weight_is_a_hyperparameter_with_a_gradient(equation: str) -> None:
    problem = small(equation)
    assert all(check_problem(problem, problem.space).smooth)
    assert problem.space.dimension == 1 + len(EQUATIONS[equation].edges)
    trained, _ = train(problem, ones(problem))
    # df/dx of a weight is its term.
    assert all(slope > 0 for slope in trained.lower_gradient["weight"].values())
    assert refit(problem, ones(problem)) is not None


def test_f_is_a_mean_over_measurements() -> None:
    problem = small("burgers", validation=30)
    (batch,) = problem.batches("upper", None)
    assert problem.batch_size(batch) == 30
    with pytest.raises(ConfigError, match="equation must be one of burgers, helmholtz, got 'wave'"):
        PhysicsInformed("wave")


# The heuristics of the benchmark.


def test_gradient_norms_weigh_by_the_residual() -> None:
    problem = small("burgers")
    torch.manual_seed(0)
    model, points = problem.model().double(), problem.data["lower"]
    before = dict.fromkeys(("residual", "initial", "left", "right", "measured"), 2.0)
    found = physics.by_gradient_norms(problem, model, points, before)

    def gradient(loss: Tensor) -> Tensor:
        parts = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
        return torch.cat([part.flatten() for part in parts]).abs()

    terms = physics.losses(problem, model, points)
    wanted = gradient(terms["residual"]).max() / gradient(2 * terms["left"]).mean()
    assert found["left"] == pytest.approx(0.9 * 2 + 0.1 * wanted.item()) and found["residual"] == 1.0


def test_the_tangent_kernel_weighs_by_its_traces() -> None:
    problem = small("burgers")
    torch.manual_seed(0)
    model, points = problem.model().double(), problem.data["lower"]
    found = physics.by_tangent_kernel(problem, model, points, {})
    traces = {}
    for name, at in (("left", points.edges["left"]), ("measured", points.at)):
        gradients = [torch.autograd.grad(model(p[None]).sum(), list(model.parameters())) for p in at]
        traces[name] = sum(part.square().sum().item() for one in gradients for part in one) / len(at)
    assert found["left"] / found["measured"] == pytest.approx(traces["measured"] / traces["left"])
    assert sum(1 / weight for weight in found.values()) == pytest.approx(1.0)


@pytest.mark.parametrize("rule", [physics.by_gradient_norms, physics.by_tangent_kernel])
def test_a_balanced_training_learns(rule: physics.Rule) -> None:
    problem = small("burgers")
    problem.epochs = 3
    found = physics.balanced(rule, problem, seed=0)
    assert found["relative_error"] < 0.9 and found["upper_loss"] > 0
