"""Ridge regression in closed form, with a known optimum of the upper level."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor, nn

from raybilevel.errors import ConfigError
from raybilevel.problem import BilevelProblem, Hyperparameters, Level
from raybilevel.space import Parameter, Space

LOW, HIGH = 1e-4, 10.0


class Ridge(BilevelProblem):
    """Ridge regression with a decay for each group of features.

    f = |X w - t|^2 / (2 n) + sum_g decay_g |w_g|^2 / 2, with groups g of neighbouring features.

    Decays are drawn at random. The validation targets are made from the weights that these decays give, plus noise that
    is orthogonal to the validation inputs. So F = |X_v w - t_v|^2 / (2 n_v) has its minimum over all w at those
    weights. `optimum` and `best_decay` are thus known, whatever the correlations of the features.
    """

    epochs = 3
    dtype = torch.double
    upper_likelihood = "none"  # the noise of the validation targets leaves no trace in F's minimiser

    def __init__(self, groups: int = 5, features: int = 30, examples: int = 60, noise: float = 0.5, seed: int = 0):
        if not 1 <= groups <= features or examples <= features or not noise > 0:
            raise ConfigError(
                "ridge needs 1 <= groups <= features < examples and noise > 0, "
                f"got {groups}, {features}, {examples} and {noise}"
            )
        self.groups, self.features, self.examples, self.noise, self.seed = groups, features, examples, noise, seed

    @property
    def space(self) -> Space:
        return Space(tuple(Parameter(("decay", f"g{g}"), LOW, HIGH, log=True) for g in range(self.groups)))

    @property
    def group(self) -> Tensor:
        return torch.arange(self.features) * self.groups // self.features

    @property
    def best_decay(self) -> Tensor:
        """The decays of the optimum, shape (groups,), well inside the box."""
        # Not the numbers of the data.
        generator = torch.Generator().manual_seed(self.seed + 1)
        return 10 ** (-3 + 3 * torch.rand(self.groups, generator=generator, dtype=torch.double))

    @property
    def optimum(self) -> float:
        """The lowest F."""
        return self.noise**2 / 2

    @cached_property
    def splits(self) -> dict[Level | str, tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.double)

        mixing = torch.eye(self.features, dtype=torch.double) + 0.3 * normal(self.features, self.features) / 5
        lower, upper, test = (normal(self.examples, self.features) @ mixing for _ in range(3))
        target = lower @ normal(self.features, 1) + self.noise * normal(self.examples, 1)
        best = solve(lower, target, self.best_decay[self.group])
        noise = normal(self.examples, 1)
        # The part that is orthogonal to the inputs, at the norm that gives F = noise^2 / 2.
        noise = noise - upper @ torch.linalg.lstsq(upper, noise).solution
        noise *= self.noise * self.examples**0.5 / noise.norm()
        return {
            "lower": (lower, target),
            "upper": (upper, upper @ best + noise),
            "test": (test, test @ best + self.noise * normal(self.examples, 1)),
        }

    def model(self) -> nn.Module:
        model = nn.Linear(self.features, 1, bias=False)
        nn.init.zeros_(model.weight)
        return model

    def batches(self, level: Level, generator: torch.Generator | None) -> Iterator[tuple[Tensor, Tensor]]:
        yield self.splits[level]

    def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: tuple[Tensor, Tensor]) -> Tensor:
        decay = torch.stack([hyperparameters["decay"][f"g{g}"] for g in range(self.groups)])[self.group]
        return self.upper_loss(model, batch) + (decay * model.get_parameter("weight").square()).sum() / 2

    def upper_loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, target = batch
        loss: Tensor = (model(x) - target).square().mean() / 2
        return loss

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(
            model.parameters(), max_iter=60, history_size=30, tolerance_grad=1e-9, line_search_fn="strong_wolfe"
        )

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {"test_loss": self.test_losses(model).mean().item()}

    def test_losses(self, model: nn.Module) -> Tensor:
        x, target = self.splits["test"]
        losses: Tensor = (model(x) - target).square().flatten() / 2
        return losses


def solve(x: Tensor, target: Tensor, decay: Tensor) -> Tensor:
    """The minimiser of f in closed form, shape (features, 1), for a decay per feature."""
    gram = x.T @ x / len(x) + torch.diag(decay)
    weights: Tensor = torch.linalg.solve(gram, x.T @ target / len(x))
    return weights
