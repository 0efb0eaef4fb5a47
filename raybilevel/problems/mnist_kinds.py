"""The MNIST 1K split with a deeper network: a decay for each layer and kind of parameter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from raybilevel.problem import Hyperparameters
from raybilevel.problems._classification import Minibatch
from raybilevel.problems.mnist import Mnist1K


class Mnist1KKinds(Mnist1K):
    """`Mnist1K` with four hidden layers, and a decay for the weights and another for the biases of each layer:

    f = cross-entropy + sum_l (weight_decay_l |W_l|^2 + bias_decay_l |b_l|^2) / (4 n)
    """

    decays = ("weight_decay", "bias_decay")

    def __init__(self, data: str | None = None, hidden: tuple[int, ...] = (50, 50, 50, 50), **options: Any) -> None:
        super().__init__(data, hidden=hidden, **options)

    def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Minibatch) -> Tensor:
        terms = []
        for name, layer in model.named_modules():
            if isinstance(layer, nn.Linear):
                terms.append(hyperparameters["weight_decay"][name] * layer.weight.square().sum())
                terms.append(hyperparameters["bias_decay"][name] * layer.bias.square().sum())
        return cross_entropy(model(batch.x), batch.y) + torch.stack(terms).sum() / (4 * batch.examples)
