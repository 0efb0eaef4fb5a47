"""What optimizers add to the loss of a training by their option `weight_decay`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from raybilevel._adapters.marks import at
from raybilevel.functional import weight_decay

COUPLED = (
    torch.optim.SGD, torch.optim.Adam, torch.optim.Adamax, torch.optim.NAdam, torch.optim.RAdam, torch.optim.RMSprop,
    torch.optim.Adagrad, torch.optim.Adadelta, torch.optim.ASGD,
)  # fmt: skip
"""They add the decay to the gradient, unless `decoupled_weight_decay` is set, so that it is part of the loss."""


@dataclass(frozen=True)
class Decay:
    """names: of tensors of weights. rate: a number or a mark."""

    names: tuple[str, ...]
    rate: float


def decays_of(optimizers: Iterable[Optimizer], model: nn.Module) -> tuple[Decay, ...]:
    """Those of the optimizers of a model that are part of the loss."""
    names = {id(weight): name for name, weight in model.named_parameters()}
    return tuple(
        Decay(tuple(names[id(weight)] for weight in group["params"] if id(weight) in names), group["weight_decay"])
        for optimizer in optimizers
        if isinstance(optimizer, COUPLED) and not isinstance(optimizer, torch.optim.AdamW)
        for group in optimizer.param_groups
        if group.get("weight_decay") and not group.get("decoupled_weight_decay")
    )


def penalty(decays: Iterable[Decay], model: nn.Module, hyperparameters: Mapping[str, Any]) -> Tensor | float:
    """decay / 2 |y|^2 over groups, at the weights in the model."""
    weights = dict(model.named_parameters())
    groups = [
        {"params": [weights[name] for name in decay.names], "weight_decay": at(decay.rate, hyperparameters)}
        for decay in decays
        if decay.names
    ]
    return weight_decay(groups) if groups else 0.0
