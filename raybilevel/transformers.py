"""Hugging Face's Trainer as a bilevel problem. It needs the extra `transformers`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from raybilevel._adapters.adapter import Adapter, Trained
from raybilevel._adapters.clock import Clock
from raybilevel._adapters.factories import Factory, check_factory, made_of
from raybilevel._adapters.loaders import in_order
from raybilevel._adapters.marks import Attributes, Held
from raybilevel._metrics import is_reserved
from raybilevel.errors import ConfigError, ProblemError
from raybilevel.problem import Batch, Hyperparameters, Level
from raybilevel.tune import conclude

__all__ = ["TrainerProblem", "from_trainer"]

LossOfBatch = Callable[[Any, Batch], Tensor]
"""A loss as a function of trainer and batch, shape ()."""
TRAINER = "_raybilevel_trainer"
PREFIX = "eval_"
OF_SPEED = ("_runtime", "_per_second", "_preparation_time")


def from_trainer(
    trainer: Factory,
    *,
    metric: str = "eval_loss",
    eval_dataset: str | None = None,
    lower_loss: LossOfBatch | None = None,
    upper_loss: LossOfBatch | None = None,
    by_values: Collection[str] = (),
    seed: int | None = 0,
    device: str = "cpu",
) -> TrainerProblem:
    """A `transformers.Trainer` as a problem and a Tune trainable in one.

        def trainer(config):
            return Trainer(BertForSequenceClassification(...), TrainingArguments(..., **config), train_dataset=...)

        problem = from_trainer(trainer)
        tune.Tuner(problem, param_space=SPACE, tune_config=tune.TuneConfig(
            search_alg=BilevelSearch(problem), metric="eval_loss", mode="min", num_samples=40
        )).fit()

    f is the trainer's `compute_loss` on its training data in eval mode, with `label_smoothing_factor`. The decay of
    AdamW, Trainer's default optimizer, is no part of a loss, so it is searched by values. F is `compute_loss` on the
    evaluation data without label smoothing, which Trainer has in its own eval_loss. Floats of the config that the
    trainer, its arguments, its loss function or its model keep are tensors while f is computed, as for
    `from_lightning`.

    trainer: a function of the config. It is called with the entries that it has parameters for. If its one parameter
        has none of their names, it gets the config.
    metric:  the name of F, which is searched. What `compute_metrics` returns is reported, too, under Trainer's names.
        If `metric` does not begin with "eval_", nor do they.
    eval_dataset: which one, if there are several by name; by default the first.
    lower_loss, upper_loss: functions of trainer and batch in their place.
    by_values: names of hyperparameters that have no gradients.
    seed:    of `set_seed` before the trainer is made, if the config has no entry "seed". None: the factory seeds.
    device:  where F, f and their gradients are taken.

    Raises:
        ConfigError: transformers is not installed, or `trainer` is no function.
        ProblemError: when it is searched: it makes no Trainer, or one without data for training or evaluation.
    """
    needed("from_trainer")
    check_factory(trainer, "trainer")
    return TrainerProblem(trainer, metric, eval_dataset, lower_loss, upper_loss, by_values, seed, device)


class TrainerProblem(Adapter):
    """What `from_trainer` makes."""

    made_by = "from_trainer"

    def __init__(
        self,
        trainer: Factory,
        metric: str,
        eval_dataset: str | None,
        lower_loss: LossOfBatch | None,
        upper_loss: LossOfBatch | None,
        by_values: Collection[str],
        seed: int | None,
        device: str,
    ) -> None:
        super().__init__(metric, by_values, device)
        self._trainer, self._eval_dataset, self._seed = trainer, eval_dataset, seed
        self._lower, self._upper = lower_loss, upper_loss

    def made(self, config: Mapping[str, Any]) -> Any:
        """The trainer of a config."""
        transformers = needed("from_trainer")
        if (seed := config.get("seed", self._seed)) is not None:
            transformers.set_seed(int(seed))
        trainer = made_of(self._trainer, config, "trainer")
        if not isinstance(trainer, transformers.Trainer):
            raise ProblemError(f"from_trainer: expected a function that makes a Trainer, got {type(trainer).__name__}")
        if trainer.model is None:
            raise ProblemError("from_trainer: the Trainer has no model; give it a model, or model_init")
        return trainer

    def marked_model(self, config: Mapping[str, Any]) -> nn.Module:
        trainer = self.made(config)
        model: nn.Module = trainer.model
        trainer.create_optimizer()
        vars(model)[TRAINER] = Held(trainer)
        self.keep_decays(model, [trainer.optimizer])
        return model

    def roots(self, model: nn.Module) -> Collection[Any]:
        trainer = vars(model)[TRAINER].value
        return [model, trainer.args, trainer.label_smoother, trainer.compute_loss_func, Attributes(trainer)]

    def training_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Batch) -> Tensor:
        trainer = vars(model)[TRAINER].value
        return compute_loss(trainer, model, batch) if self._lower is None else self._lower(trainer, batch)

    def validation_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Batch) -> Tensor:
        trainer = vars(model)[TRAINER].value
        if self._upper is not None:
            return self._upper(trainer, batch)
        smoother, trainer.label_smoother = trainer.label_smoother, None
        try:
            return compute_loss(trainer, model, batch)
        finally:
            trainer.label_smoother = smoother

    def batches(
        self, level: Level, generator: torch.Generator | None, hyperparameters: Mapping[str, Any]
    ) -> Iterator[Batch]:
        return in_order(self.once(hyperparameters, self.loaders)[level])

    def loaders(self, config: Mapping[str, Any]) -> dict[Level, Any]:
        """One per level, in order."""
        trainer = self.made(config)
        args, evaluated = trainer.args, trainer.eval_dataset
        if isinstance(evaluated, Mapping):
            evaluated = evaluated[self._eval_dataset or next(iter(evaluated))]
        for name, data in (("train_dataset", trainer.train_dataset), ("eval_dataset", evaluated)):
            if data is None:
                raise ProblemError(f"from_trainer: the Trainer has no {name}")
        return {
            "lower": ordered(trainer.get_train_dataloader(), args.train_batch_size),
            "upper": ordered(trainer.get_eval_dataloader(evaluated), args.eval_batch_size),
        }

    def train_model(self, config: Mapping[str, Any]) -> Trained:
        trainer = self.made(config)
        trainer.train()
        state = trainer.state
        share = 1.0
        # Trainer has put their weights into the model.
        if trainer.args.load_best_model_at_end and getattr(state, "best_global_step", None):
            share = state.best_global_step / state.global_step
        return Trained(trainer.model, float(state.epoch), self.evaluated(trainer), share)

    def callback(self) -> Any:
        """A `TrainerCallback` that concludes a training, for loops which call `Trainer.train` themselves.

        `Trainer.hyperparameter_search` has one. With the metric "objective" its searches on Ray have hypergradients:

            problem = from_trainer(trainer, metric="objective")
            one = trainer(config)  # with model_init, and an eval_strategy
            one.add_callback(problem.callback())
            one.hyperparameter_search(lambda _: SPACE, n_trials=20, direction="minimize", backend="ray",
                                      search_alg=BilevelSearch(problem))

        Trainer sets the arguments of a trial after it is made. Label smoothing has no effect there.
        """
        problem = self

        class Conclude(needed("from_trainer").TrainerCallback):  # type: ignore[misc]
            def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
                self.clock = Clock().__enter__()

            def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
                self.clock.__exit__()
                model, passes = given["model"], float(state.epoch)
                # Those that the trial searches; None where no search is under way.
                config = state.trial_params
                if config is not None:
                    conclude(problem, model, config, passes=passes, trained_time=self.clock.time(model))

        return Conclude()

    def evaluated(self, trainer: Any) -> dict[str, float]:
        """What Trainer evaluates, without the callbacks of the training."""
        trainer.callback_handler.callbacks = []
        found = {
            name if self.upper_metric.startswith(PREFIX) else name.removeprefix(PREFIX): value
            for name, value in trainer.evaluate().items()
            if not name.endswith(OF_SPEED)
        }
        return {name: value for name, value in found.items() if not is_reserved(name)}


def needed(function: str) -> Any:
    """The package.

    Raises:
        ConfigError: it is not installed, or accelerate is not.
    """
    try:
        importlib.import_module("accelerate")
        return importlib.import_module("transformers")
    except ImportError as error:
        raise ConfigError(f"{error}; {function} needs: pip install 'raybilevel[transformers]'") from error


def compute_loss(trainer: Any, model: nn.Module, batch: Batch) -> Tensor:
    """Trainer's, of which some take entries out of the batch."""
    loss: Tensor = trainer.compute_loss(model, dict(batch))
    return loss


def ordered(loader: Any, batch_size: int) -> Any:
    """A loader without what accelerate adds, such as another order in each epoch."""
    if isinstance(loader.dataset, IterableDataset):
        return loader
    return DataLoader(loader.dataset, batch_size, collate_fn=loader.collate_fn)
