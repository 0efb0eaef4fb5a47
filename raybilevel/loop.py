"""A training loop of plain PyTorch, written as functions, as a bilevel problem."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from raybilevel import functional
from raybilevel._adapters.adapter import Adapter, Trained
from raybilevel._adapters.factories import Factory, check_factory, made_of
from raybilevel._adapters.loaders import in_order
from raybilevel.errors import ConfigError, ProblemError
from raybilevel.problem import Batch, Hyperparameters, Level, takes_hyperparameters

__all__ = ["LoopProblem", "from_loop"]

PARTS: Mapping[Level, str] = {"lower": "train", "upper": "val"}
"""The level's part of the data."""


def from_loop(
    fit: Callable[[dict[str, Any]], Any],
    *,
    model: Factory,
    data: Factory | Mapping[str, Any],
    lower_loss: Callable[[nn.Module, Hyperparameters, Batch], Tensor],
    upper_loss: Callable[..., Tensor],
    weight_decay: str | Callable[[nn.Module, Hyperparameters], Any] | None = None,
    evaluate: Callable[[nn.Module, Mapping[str, Any]], Mapping[str, float]] | None = None,
    passes: str | Callable[[Mapping[str, Any]], float] = "epochs",
    metric: str = "val_loss",
    by_values: Collection[str] = (),
    device: str = "cpu",
) -> LoopProblem:
    """A training loop and the functions that it calls as a problem and a Tune trainable in one.

        problem = from_loop(
            fit, model=build_model, data=load_data, lower_loss=training_loss, weight_decay="weight_decay",
            upper_loss=lambda model, batch: cross_entropy(model(batch[0]), batch[1]),
        )
        tune.Tuner(problem, param_space=SPACE, tune_config=tune.TuneConfig(
            search_alg=BilevelSearch(problem), metric="val_loss", mode="min", num_samples=40
        )).fit()

    While f is computed, floats of the config are tensors, also where the model keeps them, and torch's losses are
    differentiable in them, as for `from_lightning`.

    fit:   your loop. It is given the trial's config and may report to Tune as often as it likes. It returns the
        trained model, or the model and its passes over the training data.
    model: an untrained model of a config. It is called with the entries that it has parameters for. If its one
        parameter has none of their names, it gets the config.
    data:  {"train": ..., "val": ...}, or a function that makes it of a config, called as `model` is. Each part is a
        batch, which is a tensor, a tuple or a dict of tensors, or a list or DataLoader of batches.
    lower_loss: f of model, config and batch, without what the optimizer adds, e.g. your training loss.
    upper_loss: F of model and batch, or of model, config and batch.
    weight_decay: what the optimizer adds to the loss, if it does: the name of a hyperparameter, for all weights; or a
        function of model and config that returns parameter groups, as optimizers take them.
    evaluate: further metrics of a trained model, of model and config.
    passes: over the training data, if `fit` does not return it: an entry of the config, or a function of it.
    metric: the name of F, which is searched and which `fit` reports.
    by_values: names of hyperparameters that have no gradients.
    device: where F, f and their gradients are taken.

    Raises:
        ConfigError: an argument is no function.
        ProblemError: when it is searched: the data have no such parts, or `fit` returns no model.
    """
    for name, function in {"fit": fit, "model": model, "lower_loss": lower_loss, "upper_loss": upper_loss}.items():
        check_factory(function, name)
    return LoopProblem(
        fit, model, data, lower_loss, upper_loss, weight_decay, evaluate, passes, metric, by_values, device
    )


class LoopProblem(Adapter):
    """What `from_loop` makes."""

    made_by = "from_loop"

    def __init__(
        self,
        fit: Callable[[dict[str, Any]], Any],
        model: Factory,
        data: Factory | Mapping[str, Any],
        lower_loss: Callable[[nn.Module, Hyperparameters, Batch], Tensor],
        upper_loss: Callable[..., Tensor],
        weight_decay: str | Callable[[nn.Module, Hyperparameters], Any] | None,
        evaluate: Callable[[nn.Module, Mapping[str, Any]], Mapping[str, float]] | None,
        passes: str | Callable[[Mapping[str, Any]], float],
        metric: str,
        by_values: Collection[str],
        device: str,
    ) -> None:
        super().__init__(metric, by_values, device)
        self._fit, self._model, self._data = fit, model, data
        self._lower, self._upper, self._weight_decay = lower_loss, upper_loss, weight_decay
        self._evaluate, self._passes = evaluate, passes

    def marked_model(self, config: Mapping[str, Any]) -> nn.Module:
        model: nn.Module = made_of(self._model, config, "model")
        return model

    def roots(self, model: nn.Module) -> Collection[Any]:
        return [model]

    def training_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Batch) -> Tensor:
        loss = self._lower(model, hyperparameters, batch)
        if isinstance(self._weight_decay, str):
            entry: Any = hyperparameters
            for key in self._weight_decay.split("/"):
                entry = entry[key]
            return loss + functional.weight_decay(model.parameters(), entry)
        if self._weight_decay is not None:
            return loss + functional.weight_decay(self._weight_decay(model, hyperparameters))
        return loss

    def validation_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Batch) -> Tensor:
        if takes_hyperparameters(self._upper, others=2):
            return self._upper(model, hyperparameters, batch)
        return self._upper(model, batch)

    def evaluate(self, model: nn.Module, hyperparameters: Mapping[str, Any]) -> dict[str, float]:
        return {} if self._evaluate is None else dict(self._evaluate(model, hyperparameters))

    def batches(
        self, level: Level, generator: torch.Generator | None, hyperparameters: Mapping[str, Any]
    ) -> Iterator[Batch]:
        data = self.once(hyperparameters, self.parts)
        found = data[PARTS[level]]
        yield from in_order(found) if isinstance(found, list | DataLoader) else [found]

    def parts(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        data = made_of(self._data, config, "data") if callable(self._data) else self._data
        if not (isinstance(data, Mapping) and data.keys() >= set(PARTS.values())):
            names = list(data) if isinstance(data, Mapping) else type(data).__name__
            raise ProblemError(f"from_loop: data must be a dict with 'train' and 'val', got {names}")
        return data

    def train_model(self, config: Mapping[str, Any]) -> Trained:
        found = self._fit(dict(config))
        model, *passes = found if isinstance(found, tuple) else (found,)
        if not isinstance(model, nn.Module):
            raise ProblemError(f"from_loop: fit must return the trained model, got {type(model).__name__}")
        return Trained(model, float(passes[0]) if passes else self.passes_of(config))

    def passes_of(self, config: Mapping[str, Any]) -> float:
        if callable(self._passes):
            return float(self._passes(config))
        if self._passes not in config:
            raise ConfigError(
                f"from_loop: the config has no {self._passes!r}; give passes=..., the passes over the training data, "
                "or return them from fit beside the model"
            )
        return float(config[self._passes])
