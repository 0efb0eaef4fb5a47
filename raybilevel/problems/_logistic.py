"""Multinomial logistic regression trained to its optimum, the base of the linear problems."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from raybilevel.problem import Hyperparameters
from raybilevel.problems._classification import Classification

SMOOTHING = 0.01
"""delta, in units of a weight."""


class Logistic(Classification):
    """A linear model trained from zero weights by full-batch L-BFGS in double precision. Subclasses define f.

    features, classes: sizes of the inputs and of the outputs.
    iterations:        limit of L-BFGS iterations in an epoch.
    per_class:         groups are of the inputs of each class, those of the first class first.
    """

    epochs = 5
    dtype = torch.double
    features: int
    classes: int = 10
    iterations: int = 60
    per_class: bool = False

    def model(self) -> nn.Module:
        model = nn.Linear(self.features, self.classes)
        nn.init.zeros_(model.weight)
        nn.init.zeros_(model.bias)
        return model

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(
            model.parameters(),
            max_iter=self.iterations,
            history_size=20,
            tolerance_grad=1e-6,
            tolerance_change=1e-12,
            line_search_fn="strong_wolfe",
        )

    def group_penalty(self, model: nn.Module, decays: Hyperparameters) -> Tensor:
        """sum_g decay_g |W_g|^2 / 2 over groups g0, g1, ... of neighbouring inputs."""
        return self._weighted(decays, model.get_parameter("weight").square()) / 2

    def group_absolute(self, model: nn.Module, strengths: Hyperparameters) -> Tensor:
        """sum_g strength_g |W_g|_1 over the same groups, with sqrt(w^2 + delta^2) - delta for |w|, as L-BFGS needs a
        slope at 0 (epsL1 of Schmidt, Fung & Rosales 2007). So small weights are not exactly 0."""
        smooth = (model.get_parameter("weight").square() + SMOOTHING**2).sqrt() - SMOOTHING
        return self._weighted(strengths, smooth)

    def _weighted(self, strengths: Hyperparameters, terms: Tensor) -> Tensor:
        """The sum of terms of the weights, (classes, features), times the strengths of their groups."""
        strength = torch.stack([strengths[f"g{g}"] for g in range(len(strengths))])
        # Over classes first: (classes, features) -> (features,).
        terms = terms.flatten() if self.per_class else terms.sum(0)
        group = torch.arange(len(terms), device=strength.device) * len(strength) // len(terms)
        return (strength[group] * terms).sum()


def pooled(images: Tensor, dtype: torch.dtype) -> Tensor:
    """Images, (n, 28, 28), as means of 2 x 2 pixels in [0, 1], (n, 196)."""
    means = torch.nn.functional.avg_pool2d(images.to(dtype).unsqueeze(1) / 255, 2)
    return means.flatten(1)
