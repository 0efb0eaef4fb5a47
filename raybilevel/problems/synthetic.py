"""Small problems with known solutions: an upper level with several local optima, a lower level with many minimisers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor, nn

from raybilevel.errors import ConfigError
from raybilevel.problem import BilevelProblem, Hyperparameters, Level
from raybilevel.space import Parameter, Space, sobol_points


class Point(nn.Module):
    """A lower-level variable that is a vector y. It starts at 0."""

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.y = nn.Parameter(torch.zeros(dimension))


class Analytic(BilevelProblem):
    """x in [-1, 1]^d and a vector y, trained by plain gradient descent on an f whose curvatures are 1 and 0."""

    epochs = 50
    dtype = torch.double
    upper_likelihood = "none"  # there are no examples
    dimension: int

    @property
    def space(self) -> Space:
        return Space(tuple(Parameter((f"x{i}",), -1.0, 1.0) for i in range(self.dimension)))

    def x(self, hyperparameters: Hyperparameters) -> Tensor:
        return torch.stack([hyperparameters[f"x{i}"] for i in range(self.dimension)])

    def batches(self, level: Level, generator: torch.Generator | None) -> Iterator[Tensor]:
        # One example that no loss reads.
        yield torch.zeros(1, dtype=torch.double)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        # At curvature 1 each step leaves 0.6 of the error, and 50 steps 1e-11.
        return torch.optim.SGD(model.parameters(), lr=0.4)


class SeveralOptima(Analytic):
    """A function with several local optima.

    f = |y - x|^2 / 2, so y*(x) = x, and F has one local optimum in each of `wells` quadratic wells:

        F = 1 - log(sum_k exp(-b w_k(y))) / b,   w_k = rise k + (y - c_k)' A_k (y - c_k) / 2,   b = 30

    Well 0 has the global optimum. The centres c_k are far from each other. A_k has eigenvalues between 1 and 4.
    """

    sharpness = 30.0

    def __init__(self, dimension: int = 2, wells: int = 5, rise: float = 0.08, seed: int = 2) -> None:
        if dimension < 1 or not 1 <= wells <= 16:
            raise ConfigError(f"dimension must be at least 1 and wells from 1 to 16, got {dimension} and {wells}")
        self.dimension, self.wells, self.rise, self.seed = dimension, wells, rise, seed

    @cached_property
    def centres(self) -> Tensor:
        """c_k, shape (wells, d). Each is the farthest from the earlier ones among 64 points in [-0.8, 0.8]^d."""
        points = 1.6 * sobol_points(self.dimension, 64, self.seed) - 0.8
        chosen = [points[0]]
        while len(chosen) < self.wells:
            distance = torch.cdist(points, torch.stack(chosen)).min(1).values
            chosen.append(points[distance.argmax()])
        return torch.stack(chosen)

    @cached_property
    def curvatures(self) -> Tensor:
        """A_k, shape (wells, d, d)."""
        generator = torch.Generator().manual_seed(self.seed)
        shape = (self.wells, self.dimension, self.dimension)
        rotation = torch.linalg.qr(torch.randn(shape, generator=generator, dtype=torch.double)).Q
        eigenvalues = 1 + 3 * torch.rand(shape[:2], generator=generator, dtype=torch.double)
        # Q diag(eigenvalues) Q'
        curvatures: Tensor = rotation * eigenvalues.unsqueeze(1) @ rotation.transpose(1, 2)
        return curvatures

    def value(self, y: Tensor) -> Tensor:
        """F at y, shape (d,) -> ()."""
        offset = y - self.centres
        # (y - c_k)' A_k (y - c_k) / 2, shape (wells,).
        wells = torch.einsum("ki,kij,kj->k", offset, self.curvatures, offset) / 2
        heights = self.rise * torch.arange(self.wells, dtype=torch.double)
        # A smooth minimum over the wells.
        value: Tensor = 1 - torch.logsumexp(-self.sharpness * (heights + wells), 0) / self.sharpness
        return value

    @cached_property
    def minimiser(self) -> Tensor:
        """The global optimum, by Newton steps from the deepest well's centre. The other wells hardly move it."""
        y = self.centres[0].clone()
        for _ in range(20):
            gradient = torch.func.grad(self.value)(y)
            y = y - torch.linalg.solve(torch.func.hessian(self.value)(y), gradient)
        return y

    @property
    def optimum(self) -> float:
        return self.value(self.minimiser).item()

    def model(self) -> nn.Module:
        return Point(self.dimension)

    def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Tensor) -> Tensor:
        return (model.get_parameter("y") - self.x(hyperparameters)).square().sum() / 2

    def upper_loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        return self.value(model.get_parameter("y"))


class ManyMinimisers(Analytic):
    """A training whose minimiser is not unique.

    f = |B y - x|^2 / 2, which does not determine all weights y. B, shape (2, n), and its complement N are
    orthonormal.

        F = 0.1 + |B y - e|^2 / 2 + |N y - P B y|^2 / 2

    A training from y = 0 ends at N y = 0, independently of F. Of all minimisers of f, those with N y = P B y have the
    lowest F, 0.1 + |x - e|^2 / 2, which `evaluate` reports as `optimistic_loss`. Its minimum is at x = e. F at trained
    weights has its minimum elsewhere, and a method that knows only one minimiser of f ends there.
    """

    dimension = 2
    best = 0.1

    def __init__(self, weights: int = 12, strength: float = 1.0, seed: int = 0, optimistic: bool = False) -> None:
        if weights <= self.dimension:
            raise ConfigError(f"weights must exceed {self.dimension}, got {weights}")
        self.weights, self.strength, self.seed, self.optimistic = weights, strength, seed, optimistic
        generator = torch.Generator().manual_seed(seed)
        basis = torch.linalg.qr(torch.randn(weights, weights, generator=generator, dtype=torch.double)).Q
        # B and N. The coupling below is P.
        self.pinned, self.free = basis[: self.dimension], basis[self.dimension :]
        coupling = torch.randn(weights - self.dimension, self.dimension, generator=generator, dtype=torch.double)
        self.coupling = strength * coupling / coupling.norm(dim=0)
        self.target = torch.tensor([0.6, -0.4], dtype=torch.double)

    @property
    def optimum(self) -> float:
        """The lowest F at weights trained from y = 0, or with `optimistic` at any minimisers of f."""
        if self.optimistic:
            return self.best
        # Trainings end at N y = 0, where F = 0.1 + |x - e|^2 / 2 + |P x|^2 / 2.
        hessian = torch.eye(2, dtype=torch.double) + self.coupling.T @ self.coupling
        x = torch.linalg.solve(hessian, self.target)
        distance = (x - self.target).square().sum() + (self.coupling @ x).square().sum()
        return self.best + float(distance) / 2

    def model(self) -> nn.Module:
        return Point(self.weights)

    def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Tensor) -> Tensor:
        loss: Tensor = (self.pinned @ model.get_parameter("y") - self.x(hyperparameters)).square().sum() / 2
        return loss

    def upper_loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        pinned = self.pinned @ model.get_parameter("y")
        free = self.free @ model.get_parameter("y")
        loss: Tensor = self._optimistic(pinned) + (free - self.coupling @ pinned).square().sum() / 2
        return loss

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {"optimistic_loss": self._optimistic(self.pinned @ model.get_parameter("y")).item()}

    def _optimistic(self, pinned: Tensor) -> Tensor:
        return self.best + (pinned - self.target).square().sum() / 2
