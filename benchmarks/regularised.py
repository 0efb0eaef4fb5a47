"""A network as people train them, with eight hyperparameters that stand in its loss."""

from __future__ import annotations

from collections import OrderedDict
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

from raybilevel.functional import cross_entropy
from raybilevel.problem import Hyperparameters
from raybilevel.problems._classification import Classification, Examples, Minibatch
from raybilevel.problems.long_tail import CLASSES, LongTailed
from raybilevel.space import Parameter, Space

LAYERS = ("fc1", "fc2", "fc3", "norm")
"""The beginnings of the names of layers that share a decay."""


class RegularisedNetwork(Classification):
    """Images of MNIST of which some classes are rare, by a network with BatchNorm, dropout, AdamW and a cosine:

        f = cross-entropy(z + logit_adjustment log p; weights p^-class_weight_exponent, label_smoothing)
            - confidence_penalty mean H(softmax z) + sum_l weight_decay_l |W_l|^2 / 2

    with z the logits and p the shares of the classes among the training examples. The logit adjustment is that of Menon
    et al. (2021, arXiv:2007.07314), the confidence penalty that of Pereyra et al. (2017, arXiv:1701.06548). F is the
    cross-entropy on validation examples, as many of each class.
    """

    learning_rate, dropout, width = 3e-3, 0.2, 64

    def __init__(self, data: str | None = None, split_seed: int = 0, epochs: int = 30) -> None:
        self.images = LongTailed(data, largest=200, ratio=20.0, validation=400, split_seed=split_seed)
        self.batch, self.epochs, self.evaluate_every = 50, epochs, epochs

    @property
    def space(self) -> Space:
        return Space(
            (
                Parameter(("label_smoothing",), 0.0, 0.4),
                Parameter(("class_weight_exponent",), 0.0, 1.5),
                Parameter(("logit_adjustment",), 0.0, 1.5),
                Parameter(("confidence_penalty",), 0.0, 0.5),
                *(Parameter(("weight_decay", layer), 1e-6, 1e-1, log=True) for layer in LAYERS),
            )
        )

    def load(self) -> dict[str, Examples]:
        return self.images.load()

    @cached_property
    def shares(self) -> Tensor:
        """Of the classes, shape (classes,)."""
        return torch.bincount(self.splits["lower"][1], minlength=CLASSES) / len(self.splits["lower"][1])

    def model(self) -> nn.Module:
        width, layers = self.width, OrderedDict[str, nn.Module]()
        for number, inputs in ((1, self.images.features), (2, width)):
            layers[f"fc{number}"] = nn.Linear(inputs, width)
            layers[f"norm{number}"] = nn.BatchNorm1d(width)
            layers[f"relu{number}"], layers[f"dropout{number}"] = nn.ReLU(), nn.Dropout(self.dropout)
        layers["fc3"] = nn.Linear(width, CLASSES)
        return nn.Sequential(layers)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=self.learning_rate, weight_decay=0.0)

    def schedule(self, optimizer: torch.optim.Optimizer) -> LRScheduler:
        return CosineAnnealingLR(optimizer, self.epochs)

    def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Minibatch) -> Tensor:
        logits, shares = model(batch.x), self.shares.to(batch.x)
        weights = shares ** -hyperparameters["class_weight_exponent"]
        loss = cross_entropy(
            logits + hyperparameters["logit_adjustment"] * shares.log(),
            batch.y,
            weight=weights / (shares * weights).sum(),
            label_smoothing=hyperparameters["label_smoothing"],
        )
        log_p = logits.log_softmax(1)
        entropy = -(log_p.exp() * log_p).sum(1).mean()
        decays = torch.stack([self.decay(model, layer, hyperparameters["weight_decay"][layer]) for layer in LAYERS])
        penalised: Tensor = loss - hyperparameters["confidence_penalty"] * entropy + decays.sum()
        return penalised

    @staticmethod
    def decay(model: nn.Module, layer: str, strength: Tensor) -> Tensor:
        weights = [weight for name, weight in model.named_parameters() if name.startswith(layer)]
        penalty: Tensor = strength / 2 * torch.stack([weight.square().sum() for weight in weights]).sum()
        return penalty
