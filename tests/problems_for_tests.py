"""Tiny bilevel problems whose values, gradients and optima are known in closed form or by dense algebra."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from raybilevel._descents.trained_point import TrainedPoint
from raybilevel._lower.levels import Levels
from raybilevel._lower.trained_time import per_weight
from raybilevel._lower.training import load_checkpoint, train
from raybilevel._lower.variables import BoxVariables, ConfigVariables
from raybilevel.problem import BilevelProblem, Hyperparameters, Level, minibatches
from raybilevel.space import Parameter, Space


def exact_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """L-BFGS down to rounding: with it, one epoch is a training to the minimiser."""
    return torch.optim.LBFGS(
        model.parameters(),
        max_iter=200,
        history_size=20,
        tolerance_grad=1e-13,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )


class Ridge(BilevelProblem):
    """Least squares with one decay x_j > 0 for each weight y_j.

        f(x, y) = mean (A y - t)^2 / 2 + sum_j x_j y_j^2 / 2,    F(y) = mean (B y - u)^2 / 2

    batch:     rows in a minibatch of either level; None for all.
    optimizer: builds the optimizer; L-BFGS to rounding unless given.
    """

    def __init__(
        self,
        dimension: int = 3,
        rows: int = 12,
        batch: int | None = None,
        optimizer: Callable[[nn.Module], torch.optim.Optimizer] = exact_optimizer,
        epochs: int = 1,
        dtype: torch.dtype = torch.double,
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        truth = torch.tensor([1.0, 0.0, -1.5, 0.3, 0.0, 2.0], dtype=torch.double)[:dimension]

        def examples(count: int) -> tuple[Tensor, Tensor]:
            inputs = torch.randn(count, dimension, generator=generator, dtype=torch.double)
            noise = torch.randn(count, generator=generator, dtype=torch.double)
            return inputs, inputs @ truth + 0.7 * noise

        self.dimension, self.batch, self.make_optimizer = dimension, batch, optimizer
        self.epochs, self.dtype = epochs, dtype
        self.lower, self.upper = examples(rows), examples(30)

    def model(self) -> nn.Module:
        return nn.Linear(self.dimension, 1, bias=False)

    def decay(self, hyperparameters: Hyperparameters) -> Tensor:
        return torch.stack([hyperparameters["decay"][str(j)] for j in range(self.dimension)])

    def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Any) -> Tensor:
        weights = model.get_parameter("weight")[0]
        penalty = (self.decay(hyperparameters) * weights.square()).sum() / 2
        return (model(batch[0]).squeeze(-1) - batch[1]).square().mean() / 2 + penalty

    def upper_loss(self, model: nn.Module, batch: Any) -> Tensor:
        return (model(batch[0]).squeeze(-1) - batch[1]).square().mean() / 2

    def batches(self, level: Level, generator: torch.Generator | None) -> Iterator[Any]:
        return minibatches(self.lower if level == "lower" else self.upper, self.batch, generator)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return self.make_optimizer(model)

    # The same by dense algebra, at decays x, shape (d,).

    def hessian(self, x: Tensor) -> Tensor:
        inputs, _ = self.lower
        return inputs.T @ inputs / len(inputs) + torch.diag(x)

    def solution(self, x: Tensor) -> Tensor:
        inputs, targets = self.lower
        return torch.linalg.solve(self.hessian(x), inputs.T @ targets / len(inputs))

    def f(self, x: Tensor, y: Tensor) -> Tensor:
        inputs, targets = self.lower
        return (inputs @ y - targets).square().mean() / 2 + (x * y.square()).sum() / 2

    def F(self, y: Tensor) -> Tensor:  # noqa: N802
        inputs, targets = self.upper
        return (inputs @ y - targets).square().mean() / 2

    def config(self, x: Tensor) -> dict[str, Any]:
        return {"decay": {str(j): value for j, value in enumerate(x.tolist())}}

    @property
    def space(self) -> Space:
        return Space(tuple(Parameter(("decay", str(j)), 1e-3, 10.0, log=True) for j in range(self.dimension)))

    def values(self, unit: Tensor) -> Tensor:
        """The decays at a point of the unit cube, differentiable."""
        return torch.stack([p.decode(u) for p, u in zip(self.space.parameters, unit, strict=True)])

    def reduced(self, unit: Tensor) -> Tensor:
        """F(y*(x)) at a point of the unit cube, differentiable."""
        return self.F(self.solution(self.values(unit)))


class Recorder(Ridge):
    """A ridge that remembers every weight vector at which it was asked for a loss.

    first:   at the first batch of each training.
    descent: of upper-level steps, the only ones that differentiate in eval mode.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.first: list[Tensor] = []
        self.descent: list[Tensor] = []
        self.last: nn.Module | None = None

    def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Any) -> Tensor:
        if model.training and model is not self.last:
            self.last = model
            self.first.append(model.get_parameter("weight").detach().clone())
        if not model.training and torch.is_grad_enabled():
            self.descent.append(model.get_parameter("weight").detach().clone())
        return super().lower_loss(model, hyperparameters, batch)

    def upper_loss(self, model: nn.Module, batch: Any) -> Tensor:
        if torch.is_grad_enabled():
            self.descent.append(model.get_parameter("weight").detach().clone())
        return super().upper_loss(model, batch)


class Logistic(Ridge):
    """Logistic regression on the signs of the ridge's targets: f is not quadratic, and nor is F."""

    def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Any) -> Tensor:
        weights = model.get_parameter("weight")[0]
        penalty = (self.decay(hyperparameters) * weights.square()).sum() / 2
        return self.upper_loss(model, batch) + penalty

    def upper_loss(self, model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.softplus(-batch[1].sign() * model(batch[0]).squeeze(-1)).mean()

    def f(self, x: Tensor, y: Tensor) -> Tensor:
        inputs, targets = self.lower
        return nn.functional.softplus(-targets.sign() * (inputs @ y)).mean() + (x * y.square()).sum() / 2

    def F(self, y: Tensor) -> Tensor:  # noqa: N802
        inputs, targets = self.upper
        return nn.functional.softplus(-targets.sign() * (inputs @ y)).mean()


class Network(BilevelProblem):
    """A small classifier with everything that makes a training hard to resume: dropout, batch normalisation, Adam,
    shuffled minibatches."""

    epochs = 4

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(23, 4, generator=generator)
        self.y = (self.x[:, 0] > 0).long()
        self.seen: list[Tensor] = []

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.4), nn.Linear(6, 2))

    def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Any) -> Tensor:
        if model.training:
            self.seen.append(batch[0].clone())
        decay = sum(parameter.square().sum() for parameter in model.parameters())
        return self.upper_loss(model, batch) + hyperparameters["decay"] * decay

    def upper_loss(self, model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    def batches(self, level: Level, generator: torch.Generator | None) -> Iterable[Any]:
        # In another order for the upper level: equal data of both levels are warned of.
        data = (self.x, self.y) if level == "lower" else (self.x.flip(0), self.y.flip(0))
        return minibatches(data, 8, generator)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adam(model.parameters(), lr=0.01)


class Formula(BilevelProblem):
    """Both levels as formulas in x and y, vectors: no data at all (one batch of one example).

    f, F: of (x, y) and of y.
    """

    dtype = torch.double

    def __init__(
        self,
        dimension: int,
        weights: int,
        f: Callable[[Tensor, Tensor], Tensor],
        F: Callable[[Tensor], Tensor],
        optimizer: Callable[[nn.Module], torch.optim.Optimizer] = exact_optimizer,
        epochs: int = 1,
    ) -> None:
        self.dimension, self.weights, self.f, self.F = dimension, weights, f, F
        self.make_optimizer, self.epochs = optimizer, epochs

    def model(self) -> nn.Module:
        return nn.Linear(self.weights, 1, bias=False)

    def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Any) -> Tensor:
        x = torch.stack([hyperparameters[f"x{j}"] for j in range(self.dimension)])
        return self.f(x, model.get_parameter("weight")[0])

    def upper_loss(self, model: nn.Module, batch: Any) -> Tensor:
        return self.F(model.get_parameter("weight")[0])

    def batches(self, level: Level, generator: torch.Generator | None) -> Iterable[Any]:
        return [torch.ones(1)]

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return self.make_optimizer(model)

    @property
    def space(self) -> Space:
        """x_j between 0 and 1: values are coordinates of the unit cube."""
        return unit_box(self.dimension)


def trained_point(problem: Any, unit: Tensor, seed: int = 0) -> TrainedPoint:
    """Train at a point of the unit cube and stand there."""
    _, saved = train(problem, problem.space.to_config(unit), seed)
    checkpoint = load_checkpoint(saved)
    model = problem.model().to(problem.dtype)
    model.load_state_dict(checkpoint["model"])
    point = point_at(problem, model, unit)
    point.time = per_weight(checkpoint["time"], model)
    return point


def point_at(problem: Any, model: nn.Module, unit: Tensor) -> TrainedPoint:
    """Stand at a model's weights."""
    return TrainedPoint(Levels(problem, model, BoxVariables(problem.space, {})), unit)


def levels_at(problem: BilevelProblem, model: nn.Module, config: dict[str, Any]) -> tuple[Levels, Tensor, Tensor]:
    """Both levels as functions of the floats of a config; these, and the model's weights."""
    variables = ConfigVariables(config, problem)
    levels = Levels(problem, model, variables)
    return levels, variables.x, levels.y


def vector(*coordinates: float) -> Tensor:
    return torch.tensor(coordinates, dtype=torch.double)


def unit_box(dimension: int) -> Space:
    return Space(tuple(Parameter((f"x{j}",), 0.0, 1.0) for j in range(dimension)))
