"""Problems that train in milliseconds and whose answers are known."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from raybilevel.problem import BilevelProblem, Hyperparameters, LargeUpperLevel, Level, Report
from raybilevel.space import Parameter, Space


class Parabola(BilevelProblem):
    """f = (y - log10(x))^2 and F = (y - target)^2, so y*(x) = log10(x) and the best x is 10^target, with F = 0."""

    epochs = 2
    dtype = torch.double

    def __init__(self, names: tuple[str, ...] = ("a",), target: float = -1.0) -> None:
        self.names, self.target = names, target

    def model(self) -> nn.Module:
        model = nn.Linear(len(self.names), 1, bias=False)
        nn.init.zeros_(model.weight)
        return model

    def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Any) -> Tensor:
        x = torch.stack([hyperparameters["x"][name] for name in self.names])
        return (model.weight[0] - x.log10()).square().sum() / 2

    def upper_loss(self, model: nn.Module, batch: Any) -> Tensor:
        return (model.weight[0] - self.target).square().sum()

    def batches(self, level: Level, generator: torch.Generator | None) -> Iterator[Any]:
        yield (torch.zeros(1, dtype=torch.double),)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(model.parameters(), max_iter=20, line_search_fn="strong_wolfe")

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        weight = model.weight.detach()
        return {"test_loss": (weight - self.target).square().sum().item(), "score": -float(weight.abs().sum())}


def parabola(**attributes: Any) -> Parabola:
    """A parabola with other attributes than its own."""
    problem = Parabola()
    vars(problem).update(attributes)
    return problem


class Unlucky(Parabola):
    """Trainings with x/a above a limit have a loss that is not finite."""

    def __init__(self, limit: float = 1.0) -> None:
        super().__init__()
        self.limit = limit

    def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Any) -> Tensor:
        loss = super().lower_loss(model, hyperparameters, batch)
        return loss * math.nan if hyperparameters["x"]["a"].item() > self.limit else loss


class Values(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.randn(count) / 10)


class ManyParabolas(LargeUpperLevel):
    """f = |y - x|^2 / 2 and F = mean (y - 1)^2 with x in a module: y*(x) = x, and the best x is 1 everywhere."""

    epochs = 1
    dtype = torch.double

    def __init__(self, count: int) -> None:
        self.count = count

    def upper_variables(self) -> nn.Module:
        return Values(self.count)

    def model(self) -> nn.Module:
        model = nn.Linear(self.count, 1, bias=False)
        nn.init.zeros_(model.weight)
        return model

    def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Any) -> Tensor:
        return (model.weight[0] - hyperparameters["upper"].values).square().sum() / 2

    def upper_loss(self, model: nn.Module, batch: Any) -> Tensor:
        return (model.weight[0] - 1).square().mean()

    def batches(self, level: Level, generator: torch.Generator | None) -> Iterator[Any]:
        yield (torch.zeros(1, dtype=torch.double),)


class Means(BilevelProblem):
    """Validation examples z_i ~ N(truth, 1) in every coordinate, and y*(x) = x. So F is their mean negative
    log-likelihood but for a constant, |x - mean z|^2 / 2 + const, and the best x on new data is the truth."""

    epochs = 12  # long enough for hypergradients to pay
    dtype = torch.double
    upper_likelihood = "log_likelihood"

    def __init__(self, truth: tuple[float, ...], examples: int = 50, seed: int = 0) -> None:
        self.truth = torch.tensor(truth, dtype=torch.double)
        generator = torch.Generator().manual_seed(seed)
        self.z = self.truth + torch.randn(examples, len(truth), generator=generator, dtype=torch.double)

    @property
    def space(self) -> Space:
        return Space(tuple(Parameter(("mean", f"m{j}"), -2.0, 2.0) for j in range(len(self.truth))))

    def model(self) -> nn.Module:
        model = nn.Linear(len(self.truth), 1, bias=False, dtype=torch.double)
        nn.init.zeros_(model.weight)
        return model

    def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Any) -> Tensor:
        x = torch.stack(list(hyperparameters["mean"].values()))
        return (model.weight[0] - x).square().sum() / 2

    def upper_loss(self, model: nn.Module, batch: Any) -> Tensor:
        return (batch[0] - model.weight[0]).square().sum(1).mean() / 2

    def batches(self, level: Level, generator: torch.Generator | None) -> Iterator[Any]:
        yield (self.z,)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(model.parameters(), max_iter=20, line_search_fn="strong_wolfe")

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """What F is on average over validation examples, at these weights."""
        d = len(self.truth)
        return {"test_loss": ((model.weight[0] - self.truth).square().sum().item() + d) / 2}


class TwoWeights(BilevelProblem):
    """Two weights, which gradient descent from zero takes to the minimiser of f."""

    dtype = torch.double

    def model(self) -> nn.Module:
        model = nn.Linear(2, 1, bias=False)
        nn.init.zeros_(model.weight)
        return model

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.3)


class OwnLoop(Parabola):
    """A parabola that trains itself: gradient descent, a report and a checkpoint after each of four steps.

    fault: it dies before this step, unless it was restored from a checkpoint; 0 for never.
    """

    epochs = 4

    def __init__(self, fault: int = 0) -> None:
        super().__init__()
        self.fault = fault

    def train(self, config: Mapping[str, Any], report: Report, checkpoint: Mapping[str, Any] | None) -> nn.Module:
        model, step, generator = self.model().to(self.dtype), 0, torch.Generator()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        given = {"x": {name: torch.tensor(value, dtype=self.dtype) for name, value in config["x"].items()}}
        if checkpoint is not None:
            model.load_state_dict(checkpoint["model"])
            step = checkpoint["step"]
        while step < self.epochs:
            if step == self.fault - 1 and checkpoint is None:
                raise RuntimeError("a fault")
            for batch in self.batches("lower", generator):
                optimizer.zero_grad()
                self.lower_loss(model, given, batch).backward()
                optimizer.step()
            step += 1
            report({"step_of_mine": step}, model, {"model": model.state_dict(), "step": step})
        return model
