"""The choice of penalties as a search on a Ray cluster: a trial trains all folds at one choice of penalties."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from ray import tune
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from raybilevel.folds import CrossValidated
from raybilevel.methods import Default
from raybilevel.problem import BilevelProblem, Hyperparameters, Level
from raybilevel.sklearn._folds import HIGHEST, LOWEST, Array, Penalties
from raybilevel.tune import BilevelSearch, lower_level_trainable

Splits = list[tuple[Any, Any]]


@dataclass(frozen=True)
class OnRay:
    """penalties: of each group; upper: F there; supported: how many of them the examples determine."""

    penalties: Array
    upper: float
    supported: float


class LinearFold(BilevelProblem):
    """A linear model on one fold, with the penalties of both estimators, per example.

    targets: numbers, (n, m), or the numbers of classes, (n,).
    """

    # Calls of L-BFGS, of up to 100 iterations each, as there is one batch.
    epochs = 3
    dtype = torch.double

    def __init__(self, inputs: Array, targets: Any, penalties: Penalties, train: Any, held_out: Any) -> None:
        self.group, self.unit = torch.from_numpy(penalties.group), penalties.unit
        self.classes = int(targets.max()) + 1 if targets.ndim == 1 else None
        self.outputs = self.classes or targets.shape[1]
        x, t = torch.from_numpy(inputs), torch.from_numpy(targets)
        self.data = {"lower": (x[train], t[train]), "upper": (x[held_out], t[held_out])}

    def model(self) -> nn.Module:
        model = nn.Linear(len(self.group), self.outputs)
        for weight in model.parameters():
            nn.init.zeros_(weight)
        return model

    def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: tuple[Tensor, Tensor]) -> Tensor:
        values = [hyperparameters["penalty"][str(g)] for g in range(len(hyperparameters["penalty"]))]
        penalty = torch.stack(values)[self.group]
        # The estimators' objectives, divided by n (classes) or 2 n (numbers): mse_loss is a mean over targets, too.
        fit = self.upper_loss(model, batch) * (1 if self.classes else self.outputs / 2)
        # Of two classes the estimator has one column of weights, w, where this has w / 2 and -w / 2.
        scale = 2 if self.classes == 2 else 1
        return fit + scale * (penalty * model.get_parameter("weight").square()).sum() / (2 * len(batch[0]))

    def upper_loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, target = batch
        return cross_entropy(model(x), target) if self.classes else mse_loss(model(x), target)

    def batches(self, level: Level, generator: torch.Generator | None) -> Iterator[tuple[Tensor, Tensor]]:
        yield self.data[level]

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(
            model.parameters(), max_iter=100, history_size=20, tolerance_grad=1e-8, line_search_fn="strong_wolfe"
        )


def choose_on_ray(
    inputs: Array, targets: Any, penalties: Penalties, splits: Splits, generalise: bool, trials: int
) -> OnRay:
    """The penalties that a search of so many trials expects to be best on new data."""
    problem = CrossValidated(partial(LinearFold, inputs, targets, penalties), len(inputs), splits)
    d, unit = penalties.dimension, penalties.unit
    search = BilevelSearch(problem, method=Default(generalise=generalise))
    tune.Tuner(
        lower_level_trainable(problem),
        param_space={"penalty": {str(g): tune.loguniform(LOWEST * unit, HIGHEST * unit) for g in range(d)}},
        tune_config=tune.TuneConfig(
            search_alg=search, metric="upper_loss", mode="min", num_samples=trials, reuse_actors=True
        ),
        run_config=tune.RunConfig(verbose=0),
    ).fit()
    best = search.best
    if best is None:
        raise RuntimeError(f"none of {trials} trials ended; Ray Tune has printed why")
    found = search.config_of(best)["penalty"]
    known = search.new_data
    values = np.array([found[str(g)] for g in range(d)])
    return OnRay(values, best.upper_loss, float(d) if known is None else known.supported)
