"""For how long the weights of a model were trained by optimizers that somebody else steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from raybilevel._lower.trained_time import rates

STEPS_BETWEEN = 20
"""Between two looks at the second moments, which read all of them."""


class Clock:
    """Follows every optimizer that is stepped in this process while the block lasts.

    steps: of each optimizer.
    """

    def __init__(self) -> None:
        self.steps: dict[Optimizer, int] = {}
        self._gone: dict[Optimizer, list[float]] = {}
        self._time: dict[Tensor, Tensor] = {}

    def __enter__(self) -> Clock:
        self._hook = register_optimizer_step_post_hook(self._stepped)
        return self

    def __exit__(self, *error: Any) -> None:
        self._hook.remove()

    def _stepped(self, optimizer: Optimizer, *given: Any) -> None:
        gone = self._gone.setdefault(optimizer, [0.0 for _ in optimizer.param_groups])
        for number, group in enumerate(optimizer.param_groups):
            gone[number] += float(group.get("lr", 0.0))
        self.steps[optimizer] = self.steps.get(optimizer, 0) + 1
        if self.steps[optimizer] % STEPS_BETWEEN == 0:
            self._look(optimizer)

    def _look(self, optimizer: Optimizer) -> None:
        gone = self._gone.pop(optimizer, [])
        for rate_sum, group in zip(gone, optimizer.param_groups, strict=False):
            for weight, rate in rates(optimizer, group).items():
                time = torch.where(rate.isinf(), rate, rate_sum * rate)
                self._time[weight] = self._time.get(weight, torch.zeros_like(time)) + time

    def time(self, model: nn.Module, share: float = 1.0) -> dict[str, Tensor] | None:
        """Of the tensors of a model's weights by name; None if an optimizer has not moved some of them.

        share: of the training after which the weights were kept.
        """
        for optimizer in list(self._gone):
            self._look(optimizer)
        weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        if not weights or any(weight not in self._time for weight in weights.values()):
            return None
        return {name: share * self._time[weight].cpu() for name, weight in weights.items()}
