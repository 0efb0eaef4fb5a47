"""Multinomial logistic regression trained to its optimum, the base of the linear problems."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from raybilevel.problems._classification import Classification


class Logistic(Classification):
    """A linear model trained from zero weights by full-batch L-BFGS in double precision. Subclasses define f.

    features, classes: sizes of the inputs and of the outputs.
    iterations:        limit of L-BFGS iterations in an epoch.
    """

    epochs = 5
    dtype = torch.double
    features: int
    classes: int = 10
    iterations: int = 60

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

    def group_penalty(self, model: nn.Module, decays: Sequence[Tensor]) -> Tensor:
        """sum_g decay_g |W_g|^2 / 2 over groups g of neighbouring inputs."""
        decay = torch.stack(list(decays))
        group = torch.arange(self.features, device=decay.device) * len(decay) // self.features
        # Over classes first: (classes, features) -> (features,).
        return (decay[group] * model.get_parameter("weight").square().sum(0)).sum() / 2


def pooled(images: Tensor, dtype: torch.dtype) -> Tensor:
    """Images, (n, 28, 28), as means of 2 x 2 pixels in [0, 1], (n, 196)."""
    means = torch.nn.functional.avg_pool2d(images.to(dtype).unsqueeze(1) / 255, 2)
    return means.flatten(1)
