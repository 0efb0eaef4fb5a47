"""Lightning modules as bilevel problems. It needs the extra `lightning`."""

from __future__ import annotations

import copy
import importlib
import inspect
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from raybilevel._adapters.adapter import Adapter, Trained
from raybilevel._adapters.factories import Factory, check_factory, made_of
from raybilevel._adapters.loaders import in_order
from raybilevel._metrics import is_reserved
from raybilevel.errors import ConfigError, ProblemError
from raybilevel.problem import Batch, Hyperparameters, Level

__all__ = ["LightningProblem", "from_lightning"]

LossOfBatch = Callable[[Any, Batch], Tensor]
"""A loss as a function of module and batch, shape ()."""


def from_lightning(
    module: Factory,
    data: Factory | None = None,
    trainer: Factory | Mapping[str, Any] | None = None,
    *,
    metric: str = "val_loss",
    lower_loss: str | LossOfBatch | None = None,
    upper_loss: str | LossOfBatch | None = None,
    by_values: Collection[str] = (),
    best: bool = True,
    seed: int | None = 0,
    device: str = "cpu",
) -> LightningProblem:
    """A `LightningModule`, its data and its `Trainer` as a problem and a Tune trainable in one.

        problem = from_lightning(Classifier, Images, {"max_epochs": 20, "callbacks": [EarlyStopping("val_loss")]})
        tune.Tuner(problem, param_space=SPACE, tune_config=tune.TuneConfig(
            search_alg=BilevelSearch(problem), metric="val_loss", mode="min", num_samples=40
        )).fit()

    f is what `training_step` returns in eval mode, with the `weight_decay` of torch's optimizers that is part of a loss
    (not AdamW's). F is what `validation_step` logs as `metric`. Floats of the config that the module keeps, in
    `self.hparams`, in attributes, in its layers and losses, are tensors while f is computed. torch's `cross_entropy`,
    `binary_cross_entropy_with_logits`, `huber_loss`, `smooth_l1_loss` and `leaky_relu` are differentiable in them then.

    module:  the class of the module, or a function that makes one. It is called with the entries of the config that it
        has parameters for. If its one parameter has none of their names, it gets the config.
    data:    likewise, of a `LightningDataModule`. None: the module has the loaders. Loaders are read in order.
    trainer: likewise, of a `Trainer`, or the arguments of one. They are copied for each trial. None: the search has a
        problem, but the trainable is a function of your own, which ends with `conclude(problem, module, config)`.
    metric:  what is searched. "val_loss/dataloader_idx_1" is that of the second validation loader. Without such an
        ending the first loader is the upper level's.
    lower_loss, upper_loss: the name of a method of the module, or a function, of a batch, in their place.
    by_values: names of hyperparameters, as "weight_decay/first", that have no gradients.
    best:    conclude the best weights of a `ModelCheckpoint` that monitors a metric, and not the last ones.
    seed:    of `seed_everything` before a training, if the config has no entry "seed". None: the factories seed.
    device:  where F, f and their gradients are taken.

    Raises:
        ConfigError: lightning is not installed, or an argument is no class, function or name.
        ProblemError: when it is searched: a step returns no loss, or logs no such metric.
    """
    needed("from_lightning")
    check_factory(module, "module")
    if data is not None:
        check_factory(data, "data")
    if trainer is not None and not isinstance(trainer, Mapping):
        check_factory(trainer, "trainer")
    return LightningProblem(
        module, data, trainer, metric, lower_loss or training_step, upper_loss, by_values, best, seed, device
    )


class LightningProblem(Adapter):
    """What `from_lightning` makes."""

    made_by = "from_lightning"

    def __init__(
        self,
        module: Factory,
        data: Factory | None,
        trainer: Factory | Mapping[str, Any] | None,
        metric: str,
        lower_loss: str | LossOfBatch,
        upper_loss: str | LossOfBatch | None,
        by_values: Collection[str],
        best: bool,
        seed: int | None,
        device: str,
    ) -> None:
        super().__init__(metric, by_values, device)
        self._module, self._data, self._trainer = module, data, trainer
        self._lower, self._upper = lower_loss, upper_loss
        self._best, self._seed = best, seed
        self._loader = int(metric.rpartition("/dataloader_idx_")[2]) if "/dataloader_idx_" in metric else 0

    def marked_model(self, config: Mapping[str, Any]) -> nn.Module:
        module: nn.Module = made_of(self._module, config, "module")
        module.configure_model()  # type: ignore[operator]
        self.keep_decays(module, optimizers_of(module))
        return module

    def roots(self, model: nn.Module) -> Collection[Any]:
        return [model]

    def training_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Batch) -> Tensor:
        with logged(model):
            return called(self._lower, model, batch)

    def validation_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Batch) -> Tensor:
        if self._upper is not None:
            with logged(model):
                return called(self._upper, model, batch)
        with logged(model) as values:
            model.validation_step(*arguments(model.validation_step, batch, self._loader))  # type: ignore[operator, arg-type]
        return differentiable(values, self.upper_metric, type(model).__name__)

    def batches(
        self, level: Level, generator: torch.Generator | None, hyperparameters: Mapping[str, Any]
    ) -> Iterator[Batch]:
        source = self.once(hyperparameters, self.source)
        found = source.train_dataloader() if level == "lower" else source.val_dataloader()
        if level == "upper" and isinstance(found, Sequence):
            found = found[self._loader]
        for batch in in_order(found):
            yield moved_as_a_trainer_does(source, batch, self._loader if level == "upper" else 0)

    def source(self, config: Mapping[str, Any]) -> Any:
        """What has the loaders."""
        source = made_of(self._module if self._data is None else self._data, config, "data")
        source.prepare_data()
        source.setup("fit")
        return source

    def train_model(self, config: Mapping[str, Any]) -> Trained:
        if self._trainer is None:
            raise ConfigError(
                "from_lightning: without a trainer there is nothing to train with; give it one, or conclude the "
                "problem in a function of your own"
            )
        if (seed := config.get("seed", self._seed)) is not None:
            needed("from_lightning").seed_everything(seed, verbose=False)
        module = made_of(self._module, config, "module")
        data = None if self._data is None else made_of(self._data, config, "data")
        if isinstance(self._trainer, Mapping):
            trainer = package_of(module).Trainer(**copy.deepcopy(dict(self._trainer)))
        else:
            trainer = made_of(self._trainer, config, "trainer")
        trainer.fit(module, data)
        share = restore_best(module, trainer) if self._best else 1.0
        return Trained(module, passes_of(trainer), validated(module, data, trainer), share)


def needed(function: str) -> Any:
    """The package.

    Raises:
        ConfigError: it is not installed.
    """
    for name in ("lightning.pytorch", "pytorch_lightning"):
        try:
            return importlib.import_module(name)
        except ImportError as error:
            missing = error
    raise ConfigError(f"{missing}; {function} needs: pip install 'raybilevel[lightning]'")


def package_of(module: object) -> Any:
    """The package whose `LightningModule` this is: there are two, which do not mix."""
    base = next((kind for kind in type(module).__mro__ if kind.__name__ == "LightningModule"), None)
    if base is None:
        raise ConfigError(f"module must make a LightningModule, got {type(module).__name__}")
    return importlib.import_module(
        "pytorch_lightning" if base.__module__.startswith("pytorch_lightning") else "lightning.pytorch"
    )


def training_step(module: Any, batch: Batch) -> Tensor:
    """The loss that a module's own `training_step` returns."""
    name = type(module).__name__
    if not module.automatic_optimization:
        raise ProblemError(
            f"{name}.training_step takes the steps of the optimizer itself; give from_lightning(lower_loss=...) the "
            "name of a method that returns the training loss of a batch"
        )
    found = module.training_step(*arguments(module.training_step, batch, 0))
    loss = found.get("loss") if isinstance(found, Mapping) else found
    if not isinstance(loss, Tensor):
        raise ProblemError(
            f"{name}.training_step must return the loss as a tensor, or a dict with 'loss', got {type(found).__name__}"
        )
    return loss


def called(loss: str | LossOfBatch, module: Any, batch: Batch) -> Tensor:
    """A loss that is a method of the module, or a function."""
    if callable(loss):
        return loss(module, batch)
    if not callable(method := getattr(module, loss, None)):
        raise ProblemError(f"{type(module).__name__} has no method {loss!r}, which from_lightning was given as a loss")
    found: Tensor = method(batch)
    return found


def arguments(step: Callable[..., Any], batch: Batch, loader: int) -> tuple[Any, ...]:
    """Of a step: the batch, its number and that of its loader, as many as it has parameters for."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(step).parameters.values()
    if any(p.kind == p.VAR_POSITIONAL for p in parameters):
        return batch, 0, loader
    return (batch, 0, loader)[: sum(p.kind in kinds for p in parameters)]


@contextmanager
def logged(module: nn.Module) -> Iterator[dict[str, Any]]:
    """Within it a module logs to what is yielded, with gradients, and not to its Trainer."""
    values: dict[str, Any] = {}

    def log(name: str, value: Any, *given: Any, **options: Any) -> None:
        values[name] = value

    def log_dict(dictionary: Mapping[str, Any], *given: Any, **options: Any) -> None:
        values.update(dictionary.items())

    attributes = vars(module)
    attributes |= {"log": log, "log_dict": log_dict}
    try:
        yield values
    finally:
        del attributes["log"], attributes["log_dict"]


def differentiable(values: Mapping[str, Any], metric: str, module: str) -> Tensor:
    """The metric among what was logged.

    Raises:
        ProblemError: it was not, or not as a tensor with a gradient.
    """
    name = metric if metric in values else metric.rpartition("/dataloader_idx_")[0]
    instead = "or give upper_loss=..., a function of module and batch that returns the validation loss"
    if name not in values:
        others = ", ".join(map(repr, values)) or "nothing"
        raise ProblemError(
            f"{module}.validation_step logs {others}, and the metric {metric!r} was expected; log it by "
            f"self.log({metric!r}, loss), name another one as from_lightning(metric=...), {instead}"
        )
    value = values[name]
    if not isinstance(value, Tensor):
        raise ProblemError(
            f"{module}.validation_step logs {metric!r} as {type(value).__name__}, which has no gradient; log the loss "
            f"as a tensor, {instead}"
        )
    if torch.is_grad_enabled() and not value.requires_grad:
        raise ProblemError(
            f"{module}.validation_step logs {metric!r} without a gradient; log the loss before it is detached, "
            f"{instead}"
        )
    return value


class OutsideTraining:
    """Stands for a Trainer while a module makes its optimizers. Learning rates of schedules do not matter then."""

    estimated_stepping_batches = num_training_batches = max_steps = 1000
    max_epochs, accumulate_grad_batches, world_size, num_devices = 1000, 1, 1, 1
    global_step = current_epoch = 0


def optimizers_of(module: Any) -> list[torch.optim.Optimizer]:
    """What a module's `configure_optimizers` makes."""
    trainer = module._trainer
    module._trainer = OutsideTraining()
    try:
        return list(optimizers_in(module.configure_optimizers()))
    finally:
        module._trainer = trainer


def optimizers_in(found: Any) -> Iterator[torch.optim.Optimizer]:
    """In any of the forms that `configure_optimizers` may return."""
    if isinstance(found, torch.optim.Optimizer):
        yield found
    elif isinstance(found, Mapping):
        yield from optimizers_in(found.get("optimizer"))
    elif isinstance(found, list | tuple):
        for part in found:
            yield from optimizers_in(part)


def moved_as_a_trainer_does(source: Any, batch: Batch, loader: int) -> Batch:
    """A batch after the hooks around its transfer."""
    batch = source.on_before_batch_transfer(batch, loader)
    found: Batch = source.on_after_batch_transfer(batch, loader)
    return found


def restore_best(module: nn.Module, trainer: Any) -> float:
    """Load the weights of the best checkpoint that monitors a metric; the share of the training that they have had."""
    for callback in trainer.checkpoint_callbacks:
        path = getattr(callback, "best_model_path", "")
        if getattr(callback, "monitor", None) and path and os.path.exists(path):
            # This trial has written it, with whatever hyperparameters the module saves.
            saved = torch.load(path, map_location="cpu", weights_only=False)
            module.load_state_dict(saved["state_dict"])
            return float(saved["global_step"] / max(1, trainer.global_step))
    return 1.0


def passes_of(trainer: Any) -> float:
    """Over the training data."""
    batches = trainer.fit_loop.epoch_loop.batch_progress.total.completed
    loader: Iterable[Any] = trainer.train_dataloader
    try:
        length = len(loader)  # type: ignore[arg-type]
    except TypeError:  # an iterable data set
        length = 0
    return float(batches / length if length else max(1, trainer.current_epoch))


def validated(module: nn.Module, data: Any, trainer: Any) -> dict[str, float]:
    """What the validation logs of a trained module, without the callbacks of the training."""
    on_cpu = next(module.parameters()).device.type == "cpu"
    limit = {} if trainer.limit_val_batches == 1.0 else {"limit_val_batches": trainer.limit_val_batches}
    fresh = type(trainer)(
        accelerator="cpu" if on_cpu else "auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **limit,
    )
    fresh.validate(module, data, verbose=False)
    return {name: value.item() for name, value in fresh.callback_metrics.items() if not is_reserved(name)}
