"""Physics-informed networks: the terms of their loss are weighed by measurements that were held out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from raybilevel.errors import ConfigError
from raybilevel.problem import BilevelProblem, Hyperparameters, Level
from raybilevel.problems._classification import check_positive
from raybilevel.space import Parameter, Space

LOW, HIGH = 1e-4, 1e4
VISCOSITY = 0.05
WAVE_NUMBER = 1.0
WAVES = 1.0, 3.0
NODES = 80
"""Of the quadrature of the solution of Burgers' equation."""
GRID = 41
"""Points along each side at which a network is compared with the solution."""


class Points(NamedTuple):
    """Where the terms of f are evaluated, both coordinates of each point, shape (n, 2), and measurements.

    inside:   collocation points.
    edges:    by the name of their term.
    at, measured: of measurements, shapes (n, 2) and (n, 1).
    """

    inside: Tensor
    edges: Mapping[str, Tensor]
    at: Tensor
    measured: Tensor


class Derivatives(NamedTuple):
    """Of u at points, each shape (n, 1): first ones along both coordinates, then second ones."""

    first: tuple[Tensor, Tensor]
    second: tuple[Tensor, Tensor]


class Equation(NamedTuple):
    """A differential equation in a box, with a solution that is known.

    low, high: of the box.
    edges:     by name, the coordinate that is fixed there, and its value.
    residual:  of points, u and its derivatives, each shape (n, 1).
    solution:  u at points, shape (n, 2) -> (n, 1).
    """

    low: tuple[float, float]
    high: tuple[float, float]
    edges: Mapping[str, tuple[int, float]]
    residual: Callable[[Tensor, Tensor, Derivatives], Tensor]
    solution: Callable[[Tensor], Tensor]


def burgers_residual(points: Tensor, u: Tensor, derivatives: Derivatives) -> Tensor:
    along, over_time = derivatives.first
    return over_time + u * along - VISCOSITY * derivatives.second[0]


def burgers_solution(points: Tensor) -> Tensor:
    """By the transform of Cole and Hopf, with Gauss-Hermite quadrature (Basdevant et al. 1986, Comput. Fluids 14)."""
    nodes, weights = (torch.from_numpy(a).to(points) for a in np.polynomial.hermite.hermgauss(NODES))
    x, t = points[:, :1], points[:, 1:]
    shifted = torch.pi * (x - 2 * (VISCOSITY * t).sqrt() * nodes)
    mass = weights * torch.exp(-shifted.cos() / (2 * torch.pi * VISCOSITY))
    u: Tensor = -(shifted.sin() * mass).sum(1, keepdim=True) / mass.sum(1, keepdim=True)
    return u


def helmholtz_solution(points: Tensor) -> Tensor:
    u: Tensor = torch.stack([(torch.pi * w * points[:, i]).sin() for i, w in enumerate(WAVES)], 1).prod(1, keepdim=True)
    return u


def helmholtz_residual(points: Tensor, u: Tensor, derivatives: Derivatives) -> Tensor:
    eigenvalue = sum((torch.pi * wave) ** 2 for wave in WAVES)
    source = (WAVE_NUMBER**2 - eigenvalue) * helmholtz_solution(points)
    one, other = derivatives.second
    return one + other + WAVE_NUMBER**2 * u - source


EQUATIONS = {
    # u_t + u u_x = nu u_xx, coordinates (x, t), u = -sin(pi x) at first and 0 at both ends.
    "burgers": Equation(
        (-1.0, 0.0),
        (1.0, 1.0),
        {"initial": (1, 0.0), "left": (0, -1.0), "right": (0, 1.0)},
        burgers_residual,
        burgers_solution,
    ),
    # u_xx + u_yy + k^2 u = q, with q from the solution sin(pi x) sin(3 pi y), which is 0 on all sides.
    "helmholtz": Equation(
        (-1.0, -1.0),
        (1.0, 1.0),
        {"left": (0, -1.0), "right": (0, 1.0), "bottom": (1, -1.0), "top": (1, 1.0)},
        helmholtz_residual,
        helmholtz_solution,
    ),
}


class PhysicsInformed(BilevelProblem):
    """A network u(x) whose loss has the residual of a differential equation (Raissi, Perdikaris & Karniadakis 2019):

        f = data + weight_residual residual^2 + sum_e weight_e (u - u_e)^2,    F = error at other measurements,

    each term a mean over its points. The weight of the data is 1, as a common factor of all weights changes nothing.
    The equations are "burgers" and "helmholtz" of Wang, Teng & Perdikaris (2021, SIAM J. Sci. Comput. 43(5)), with a
    larger viscosity and a lower frequency.

    measurements, validation: in training, and for F, with normal noise of standard deviation `noise`.
    collocation, edge: points of the residual, and of each edge.
    """

    epochs = 12
    dtype = torch.double
    upper_likelihood = "squared_error"

    def __init__(
        self,
        equation: str = "burgers",
        measurements: int = 20,
        validation: int = 50,
        noise: float = 0.1,
        collocation: int = 300,
        edge: int = 30,
        width: int = 20,
        data_seed: int = 0,
    ) -> None:
        if equation not in EQUATIONS:
            raise ConfigError(f"equation must be one of {', '.join(EQUATIONS)}, got {equation!r}")
        check_positive(
            measurements=measurements, validation=validation, collocation=collocation, edge=edge, width=width
        )
        self.name, self.noise = equation, noise
        self.measurements: dict[Level, int] = {"lower": measurements, "upper": validation}
        self.collocation, self.edge, self.width, self.data_seed = collocation, edge, width, data_seed

    @property
    def equation(self) -> Equation:
        return EQUATIONS[self.name]

    @cached_property
    def space(self) -> Space:
        terms = ("residual", *self.equation.edges)
        return Space(tuple(Parameter(("weight", term), LOW, HIGH, log=True) for term in terms))

    @cached_property
    def data(self) -> dict[Level, Points]:
        """The points of both levels, drawn from the seed."""
        generator = torch.Generator().manual_seed(self.data_seed)
        low, high = (torch.tensor(end, dtype=self.dtype) for end in (self.equation.low, self.equation.high))

        def draw(count: int) -> Tensor:
            return low + (high - low) * torch.rand(count, 2, generator=generator, dtype=self.dtype)

        def on_edge(coordinate: int, value: float) -> Tensor:
            points = draw(self.edge)
            points[:, coordinate] = value
            return points

        inside = draw(self.collocation)
        edges = {name: on_edge(*where) for name, where in self.equation.edges.items()}
        found: dict[Level, Points] = {}
        for level, count in self.measurements.items():
            at = draw(count)
            noise = self.noise * torch.randn(count, 1, generator=generator, dtype=self.dtype)
            found[level] = Points(inside, edges, at, self.equation.solution(at) + noise)
        return found

    def model(self) -> nn.Module:
        width = self.width
        layers = nn.Linear(2, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)
        return nn.Sequential(*layers)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(model.parameters(), max_iter=25, history_size=50, line_search_fn="strong_wolfe")

    def batches(self, level: Level, generator: torch.Generator | None) -> Iterator[Points]:
        yield self.data[level]

    def refit_batches(self, generator: torch.Generator | None) -> Iterator[Points]:
        one, other = self.data["lower"], self.data["upper"]
        yield one._replace(at=torch.cat([one.at, other.at]), measured=torch.cat([one.measured, other.measured]))

    def batch_size(self, batch: Points) -> int:
        """Measurements: F is a mean over them."""
        return len(batch.at)

    def losses(self, model: nn.Module, batch: Points) -> dict[str, Tensor]:
        """The terms of f that have weights, by name."""
        edges = {name: (model(at) - self.equation.solution(at)).square().mean() for name, at in batch.edges.items()}
        return {"residual": self.residuals(model, batch.inside).square().mean(), **edges}

    def residuals(self, model: nn.Module, points: Tensor) -> Tensor:
        """Of the equation at points, shape (n, 2) -> (n, 1), with a graph."""
        points = points.detach().requires_grad_(True)
        # f is also evaluated where its own gradient is not asked for.
        with torch.enable_grad():
            u = model(points)
            (slope,) = torch.autograd.grad(u.sum(), points, create_graph=True)
            first = slope[:, :1], slope[:, 1:]
            second = tuple(
                torch.autograd.grad(first[i].sum(), points, create_graph=True)[0][:, i : i + 1] for i in range(2)
            )
            return self.equation.residual(points, u, Derivatives(first, (second[0], second[1])))

    def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Points) -> Tensor:
        weighted = [hyperparameters["weight"][term] * loss for term, loss in self.losses(model, batch).items()]
        loss: Tensor = self.upper_loss(model, batch) + torch.stack(weighted).sum()
        return loss

    def upper_loss(self, model: nn.Module, batch: Points) -> Tensor:
        error: Tensor = (model(batch.at) - batch.measured).square().mean()
        return error

    def evaluate(self, model: nn.Module) -> dict[str, Any]:
        """The mean squared error on a grid, and its root relative to that of u = 0."""
        ends = zip(self.equation.low, self.equation.high, strict=True)
        grid = torch.cartesian_prod(*(torch.linspace(a, b, GRID, dtype=self.dtype) for a, b in ends)).to(self.device)
        truth = self.equation.solution(grid)
        error = (model(grid) - truth).square().mean()
        return {"test_loss": error.item(), "relative_error": (error / truth.square().mean()).sqrt().item()}
