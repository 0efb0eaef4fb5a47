"""Nets of skorch as bilevel problems. It needs the extra `skorch`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from raybilevel._adapters.adapter import Adapter, Trained
from raybilevel._adapters.factories import Factory, check_factory, made_of
from raybilevel._adapters.loaders import in_order
from raybilevel._adapters.marks import Attributes, Held
from raybilevel.errors import ConfigError, ProblemError
from raybilevel.problem import Batch, Hyperparameters, Level

__all__ = ["NetProblem", "from_net"]

NET = "_raybilevel_net"


def from_net(
    net: Factory,
    data: tuple[Any, Any] | Factory,
    *,
    metric: str = "valid_loss",
    upper_loss: Callable[[Any, Tensor], Tensor] | None = None,
    evaluate: Callable[[Any], Mapping[str, float]] | None = None,
    by_values: Collection[str] = (),
    seed: int | None = 0,
    device: str = "cpu",
) -> NetProblem:
    """A `NeuralNet` of skorch as a problem and a Tune trainable in one.

        def net(config):
            return NeuralNetClassifier(Module, criterion=nn.CrossEntropyLoss,
                                       criterion__label_smoothing=config["label_smoothing"],
                                       optimizer__weight_decay=config["weight_decay"])

        problem = from_net(net, (x, y), upper_loss=torch.nn.functional.cross_entropy)
        tune.Tuner(problem, param_space=SPACE, tune_config=tune.TuneConfig(
            search_alg=BilevelSearch(problem), metric="valid_loss", mode="min", num_samples=40
        )).fit()

    f is the net's `get_loss` on its training examples in eval mode, with the `weight_decay` of torch's optimizers that
    is part of a loss (not AdamW's). Floats of the config that the net, its module and its criterion keep are tensors
    while f is computed, as for `from_lightning`.

    net:  a function of the config that makes a net. It is called with the entries that it has parameters for. If its
        one parameter has none of their names, it gets the config.
    data: X and y, or a function that returns them. The net's own `train_split` says which are validation examples.
    metric: the name of F, which is searched.
    upper_loss: F of what the module returns and targets. None: `get_loss`, as in the net's own valid_loss. That has the
        hyperparameters of the criterion in it, so give another F if they are searched.
    evaluate: further metrics of a net that was trained.
    by_values: names of hyperparameters that have no gradients.
    seed:   of torch's random numbers before a training, if the config has no entry "seed". None: the factory seeds.
    device: where F, f and their gradients are taken. It must be the net's own, to which the net moves examples.

    Raises:
        ConfigError: skorch is not installed, or `net` is no function.
        ProblemError: when it is searched: it makes no net, or one without validation examples.
    """
    needed("from_net")
    check_factory(net, "net")
    return NetProblem(net, data, metric, upper_loss, evaluate, by_values, seed, device)


class NetProblem(Adapter):
    """What `from_net` makes."""

    made_by = "from_net"

    def __init__(
        self,
        net: Factory,
        data: tuple[Any, Any] | Factory,
        metric: str,
        upper_loss: Callable[[Any, Tensor], Tensor] | None,
        evaluate: Callable[[Any], Mapping[str, float]] | None,
        by_values: Collection[str],
        seed: int | None,
        device: str,
    ) -> None:
        super().__init__(metric, by_values, device)
        self._net, self._data, self._upper, self._evaluate, self._seed = net, data, upper_loss, evaluate, seed

    def made(self, config: Mapping[str, Any]) -> Any:
        """The net of a config, not trained."""
        skorch = needed("from_net")
        net = made_of(self._net, config, "net")
        if not isinstance(net, skorch.NeuralNet):
            raise ProblemError(f"from_net: expected a function that makes a NeuralNet, got {type(net).__name__}")
        return net

    def examples(self, config: Mapping[str, Any]) -> tuple[Any, Any]:
        x, y = made_of(self._data, config, "data") if callable(self._data) else self._data
        return x, y

    def marked_model(self, config: Mapping[str, Any]) -> nn.Module:
        net = self.made(config).initialize()
        module: nn.Module = net.module_
        vars(module)[NET] = Held(net)
        self.keep_decays(module, [net.optimizer_])
        return module

    def roots(self, model: nn.Module) -> Collection[Any]:
        net = vars(model)[NET].value
        return [model, net.criterion_, Attributes(net)]

    def training_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Batch) -> Tensor:
        net = vars(model)[NET].value
        x, y = batch
        loss: Tensor = net.get_loss(net.infer(x), y, X=x, training=True)
        return loss

    def validation_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Batch) -> Tensor:
        net = vars(model)[NET].value
        x, y = batch
        if self._upper is not None:
            return self._upper(net.infer(x), y)
        loss: Tensor = net.get_loss(net.infer(x), y, X=x, training=False)
        return loss

    def batches(
        self, level: Level, generator: torch.Generator | None, hyperparameters: Mapping[str, Any]
    ) -> Iterator[Batch]:
        return in_order(self.once(hyperparameters, self.iterators)[level])

    def iterators(self, config: Mapping[str, Any]) -> dict[Level, Any]:
        """One per level."""
        net = self.made(config)
        lower, upper = net.get_split_datasets(*self.examples(config))
        if upper is None:
            raise ProblemError("from_net: the net has no validation examples; give it a train_split")
        return {"lower": net.get_iterator(lower, training=False), "upper": net.get_iterator(upper, training=False)}

    def train_model(self, config: Mapping[str, Any]) -> Trained:
        if (seed := config.get("seed", self._seed)) is not None:
            torch.manual_seed(seed)
        net, epochs = self.made(config), 0

        def counted(net: Any, *given: Any, **named: Any) -> None:
            nonlocal epochs
            epochs += 1
            type(net).on_epoch_end(net, net, *given, **named)

        # Not by its history, which a callback that loads the best weights puts back to their epoch.
        vars(net)["on_epoch_end"] = counted
        net.fit(*self.examples(config))
        metrics = self._evaluate(net) if self._evaluate is not None else {}
        return Trained(net.module_, float(epochs), metrics, share_of_best(net, epochs))


def needed(function: str) -> Any:
    """The package.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module("skorch")
    except ImportError as error:
        raise ConfigError(f"{error}; {function} needs: pip install 'raybilevel[skorch]'") from error


def share_of_best(net: Any, epochs: int) -> float:
    """Of the epochs, those that the weights have had which a callback has loaded at the end."""
    for _, callback in net.callbacks_:
        if not getattr(callback, "load_best", False):
            continue
        monitor = getattr(callback, "monitor", None)
        if (best := getattr(callback, "best_epoch_", None)) is None and monitor in net.history[-1]:
            # Of Checkpoint, whose monitor is a column that says whether an epoch was the best so far.
            best = max((row["epoch"] for row in net.history if row[monitor]), default=None)
        if best is not None:
            return float(best) / epochs
    return 1.0
