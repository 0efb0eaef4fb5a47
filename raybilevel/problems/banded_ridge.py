"""Banded ridge regression: one penalty per group of features, chosen by cross-validation."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any, NamedTuple

import torch
from sklearn.model_selection import KFold
from torch import Tensor, nn

from raybilevel.errors import ConfigError
from raybilevel.problem import BilevelProblem, Hyperparameters, Level
from raybilevel.problems._classification import check_positive
from raybilevel.space import Parameter, Space

LOW, HIGH = 1e-2, 1e3


class Folded(NamedTuple):
    """Inputs, (n, features), targets, (n,), and which examples each fold is trained on, (n, folds), 1 or 0."""

    x: Tensor
    target: Tensor
    trained: Tensor


class Folds(nn.Module):
    """A linear model for each fold: weights, (features, folds)."""

    def __init__(self, features: int, folds: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(features, folds))

    def forward(self, x: Tensor) -> Tensor:
        """Inputs, (n, features) -> predictions of each fold, (n, folds)."""
        return x @ self.weight


class BandedRidge(BilevelProblem):
    """Ridge regression with a decay for each group of features, judged by cross-validation.

    f = sum_k [ mean over fold k's training part of (x . w_k - t)^2 / 2 + sum_g decay_g |w_kg|^2 / 2 ], and F is the
    mean squared error of each example where it is held out.

    The folds are one model, trained together. A refit trains each on all examples.

    Simulated as in himalaya (la Tour et al. 2022, NeuroImage): normal features and weights, the groups' shares of the
    variance drawn from a Dirichlet distribution with concentration 0.3, so that a few groups carry most of it. Targets
    without their noise have variance 1.
    """

    # Calls of L-BFGS, of up to 100 iterations each, as there is one batch.
    epochs = 3
    dtype = torch.double
    upper_likelihood = "squared_error"

    def __init__(
        self,
        groups: int = 20,
        features: int = 15,
        examples: int = 200,
        tested: int = 400,
        noise: float = 0.5,
        folds: int = 5,
        seed: int = 0,
    ) -> None:
        check_positive(groups=groups, features=features, tested=tested, noise=noise)
        if not 2 <= folds <= examples:
            raise ConfigError(f"folds must be from 2 to the number of examples, {examples}, got {folds}")
        self.groups, self.features, self.examples, self.tested = groups, features, examples, tested
        self.noise, self.folds, self.seed = noise, folds, seed

    @property
    def space(self) -> Space:
        return Space(tuple(Parameter(("decay", f"g{g}"), LOW, HIGH, log=True) for g in range(self.groups)))

    @cached_property
    def shares(self) -> Tensor:
        """Of the groups in the variance of the targets without their noise, shape (groups,)."""
        with torch.random.fork_rng(devices=[]):
            # torch's distributions take no generator.
            torch.manual_seed(self.seed)
            found: Tensor = torch.distributions.Dirichlet(torch.full((self.groups,), 0.3, dtype=self.dtype)).sample()
        return found

    @cached_property
    def data(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Inputs and targets of "train" and "test"."""
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=self.dtype)

        weight = normal(self.groups * self.features) * self.shares.sqrt().repeat_interleave(self.features)
        x, x_test = (normal(count, len(weight)) for count in (self.examples, self.tested))
        scale = (x @ weight).std()
        return {
            name: (inputs, inputs @ weight / scale + self.noise * normal(len(inputs)))
            for name, inputs in (("train", x), ("test", x_test))
        }

    @property
    def true_decays(self) -> dict[str, dict[str, float]]:
        """The decays that the true variances of the weights and of the noise give to the training part of a fold: its
        weights are then their posterior mean. No example has a part in them."""
        trained = self.examples * (self.folds - 1) / self.folds
        decays = (self.noise**2 * self.features / (trained * self.shares)).clamp(LOW, HIGH)
        return {"decay": {f"g{g}": decay for g, decay in enumerate(decays.tolist())}}

    def __getstate__(self) -> dict[str, Any]:
        # Each process draws the data itself, from the seed.
        return {name: value for name, value in self.__dict__.items() if name not in ("data", "shares")}

    def model(self) -> nn.Module:
        return Folds(self.groups * self.features, self.folds)

    def batches(self, level: Level, generator: torch.Generator | None) -> Iterator[Folded]:
        x, target = self.data["train"]
        trained = torch.ones(len(x), self.folds, dtype=self.dtype)
        for fold, (_, held_out) in enumerate(KFold(self.folds).split(x)):
            trained[held_out, fold] = 0
        yield Folded(x, target, trained)

    def refit_batches(self, generator: torch.Generator | None) -> Iterator[Folded]:
        x, target = self.data["train"]
        yield Folded(x, target, torch.ones(len(x), self.folds, dtype=self.dtype))

    def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Folded) -> Tensor:
        decay = torch.stack([hyperparameters["decay"][f"g{g}"] for g in range(self.groups)])
        squares = (model(batch.x) - batch.target.unsqueeze(1)).square() * batch.trained
        # (groups,): squares over the folds and the features of each group.
        by_group = model.get_parameter("weight").square().sum(1).reshape(self.groups, self.features).sum(1)
        loss: Tensor = ((squares.sum(0) / batch.trained.sum(0)).sum() + (decay * by_group).sum()) / 2
        return loss

    def upper_loss(self, model: nn.Module, batch: Folded) -> Tensor:
        squares = (model(batch.x) - batch.target.unsqueeze(1)).square()
        # Each example is held out by one fold, so the sum has n terms.
        loss: Tensor = (squares * (1 - batch.trained)).sum() / len(batch.x)
        return loss

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(
            model.parameters(),
            max_iter=100,
            history_size=20,
            tolerance_grad=1e-7,
            tolerance_change=1e-14,
            line_search_fn="strong_wolfe",
        )

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Mean squared error and explained variance of the folds' mean prediction on the test examples."""
        loss, (_, target) = self.test_losses(model).mean(), self.data["test"]
        return {"test_loss": loss.item(), "test_r2": (1 - loss / target.var(correction=0)).item()}

    def test_losses(self, model: nn.Module) -> Tensor:
        x, target = self.data["test"]
        losses: Tensor = (model(x).mean(1) - target).square()
        return losses
