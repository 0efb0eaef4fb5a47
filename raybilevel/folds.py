"""Cross-validation as the upper level: one lower level per fold, all trained in one trial."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.model_selection import BaseCrossValidator, check_cv
from torch import Tensor, nn

from raybilevel._lower.training import LowerLevelTraining
from raybilevel._metrics import PASSES, UPPER_LOSS
from raybilevel.errors import ConfigError, ProblemError
from raybilevel.problem import (
    Batch,
    BilevelProblem,
    Hyperparameters,
    Level,
    Report,
    evaluate,
    make_batches,
    make_model,
    move,
    trains_itself,
    upper_loss,
)
from raybilevel.space import Space

__all__ = ["CrossValidated"]

Indices = NDArray[np.intp]
SETTINGS = ("epochs", "evaluate_every", "device", "dtype", "upper_likelihood")


class FoldBatch(NamedTuple):
    """A batch of the fold with that number."""

    fold: int
    batch: Batch


class TrainedFold(NamedTuple):
    """What the training of a fold has ended with.

    weights: of its model, by name.
    passes:  what it cost, in passes over its own lower level.
    times:   for which its weights were trained, by name.
    """

    weights: Mapping[str, Tensor]
    passes: float
    upper_loss: float
    times: Mapping[str, Tensor]


class CrossValidated(BilevelProblem):
    """A problem on the folds of its examples.

        min_x mean over examples of F_k(x, y_k)   subject to   y_k in argmin f_k(x, .)

    k is the fold in which an example is held out. Each fold has weights y_k of its own and is trained as `make`'s
    problem is trained alone. A trial trains all folds, one after the other, and reports F of those that it has trained
    so far, so a scheduler may stop a bad trial after its first folds. Hypergradients of the folds add up. `evaluate`
    reports F of each fold and the standard error over folds, and the means of what the folds' own `evaluate` says.
    A refit trains on all examples. `fold_parallel_trainable` trains the folds of a trial side by side.

        CrossValidated(lambda train, held_out: MyProblem(x[train], t[train], x[held_out], t[held_out]), len(x), folds=5)

    Args:
        make: the problem of one fold, of the indices of the examples that it is trained on and of those held out. To
            be sent to workers, it must be picklable by Ray.
        examples: how many there are.
        folds: a number, a splitter of scikit-learn, or an iterable of (train, held out).
        targets: of each example, for splitters that ask for them, e.g. `StratifiedKFold`.
        groups: likewise, e.g. for `GroupKFold`.

    Raises:
        ConfigError: there are fewer than two folds.
        ProblemError: the problem is `optimistic`, or trains itself.
    """

    def __init__(
        self,
        make: Callable[[Indices, Indices], BilevelProblem],
        examples: int,
        folds: int | BaseCrossValidator | Iterable[tuple[Indices, Indices]] = 5,
        targets: Any = None,
        groups: Any = None,
    ) -> None:
        if isinstance(folds, int) and not 2 <= folds <= examples:
            raise ConfigError(f"folds must be from 2 to the number of examples, {examples}, got {folds}")
        # Of the inputs splitters read only how many rows there are.
        splits = list(check_cv(folds).split(np.zeros((examples, 1)), targets, groups))
        if len(splits) < 2:
            raise ConfigError(f"folds must be at least two splits into (train, held out), got {len(splits)}")
        self.make, self.examples = make, examples
        self.upper_repeats = times_held_out(splits)
        self.problems = [make(np.asarray(train), np.asarray(held_out)) for train, held_out in splits]
        first = self.problems[0]
        if first.optimistic or trains_itself(first):
            what = "train" if trains_itself(first) else "optimistic"
            raise ProblemError(
                f"{type(first).__name__}.{what}: a cross-validated problem does not have it; leave it out"
            )
        for name in SETTINGS:
            setattr(self, name, getattr(first, name))

    @property
    def space(self) -> Space | None:
        return self.problems[0].space

    def model(self, hyperparameters: Hyperparameters) -> nn.ModuleList:
        return nn.ModuleList(make_model(problem, hyperparameters) for problem in self._placed())

    def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: FoldBatch) -> Tensor:
        return self.problems[batch.fold].lower_loss(fold_of(model, batch.fold), hyperparameters, batch.batch)

    def upper_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: FoldBatch) -> Tensor:
        return upper_loss(self.problems[batch.fold], fold_of(model, batch.fold), hyperparameters, batch.batch)

    def batches(
        self, level: Level, generator: torch.Generator | None, hyperparameters: Hyperparameters
    ) -> Iterator[FoldBatch]:
        for fold, problem in enumerate(self.problems):
            for batch in make_batches(problem, level, generator, hyperparameters):
                yield FoldBatch(fold, batch)

    def batch_size(self, batch: FoldBatch) -> int:
        return self.problems[batch.fold].batch_size(batch.batch)

    def evaluate(self, model: nn.Module, hyperparameters: Hyperparameters) -> dict[str, float]:
        found = [evaluate(problem, fold_of(model, k), hyperparameters) for k, problem in enumerate(self._placed())]
        means = {name: statistics.fmean(metrics[name] for metrics in found) for name in found[0]}
        losses = [self._upper(model, k, hyperparameters) for k in range(len(self.problems))]
        error = statistics.stdev(losses) / math.sqrt(len(losses))
        return {**means, **{f"fold_{k}": loss for k, loss in enumerate(losses)}, "standard_error": error}

    def train(self, config: Mapping[str, Any], report: Report, checkpoint: Mapping[str, Any] | None) -> nn.Module:
        trained, passes = (list(checkpoint["folds"]), checkpoint["passes"]) if checkpoint else ([], 0.0)
        model, count = make_model(self, config), len(self.problems)
        losses = [float(loss) for loss in checkpoint["losses"]] if checkpoint else []
        times: dict[str, Tensor] = dict(checkpoint["times"]) if checkpoint else {}
        for fold, state in enumerate(trained):
            fold_of(model, fold).load_state_dict(state)
        rest = range(len(trained), count)
        # `train_itself` has seeded torch. Every fold begins from that seed, as its problem would alone.
        for fold, found in zip(rest, self.train_folds(config, torch.initial_seed(), rest), strict=True):
            trained.append(found.weights)
            fold_of(model, fold).load_state_dict(found.weights)
            # A pass over this problem's lower level is one over that of each fold.
            passes, losses = passes + found.passes / count, [*losses, found.upper_loss]
            times |= {f"{fold}.{name}": time for name, time in found.times.items()}
            # Whole folds alone are kept: one that is interrupted is trained again.
            saved = {"folds": trained, "passes": passes, "losses": losses, "times": times}
            report({UPPER_LOSS: statistics.fmean(losses), PASSES: passes}, checkpoint=saved, trained_time=times)
        return model

    def train_folds(self, config: Mapping[str, Any], seed: int, folds: Sequence[int]) -> Iterator[TrainedFold]:
        """What comes of folds, in their order."""
        for fold in folds:
            yield self.train_fold(config, seed, fold)

    def train_fold(self, config: Mapping[str, Any], seed: int, fold: int) -> TrainedFold:
        """One fold, in this process."""
        training = LowerLevelTraining(self._placed()[fold], config, seed)
        training.run()
        weights, times = training.levels.model.state_dict(), training.hooks.time.state_dict()
        return TrainedFold(weights, training.passes, training.upper(), times)

    def on_all_examples(self) -> BilevelProblem:
        """The problem of a refit, trained on all examples."""
        everything = np.arange(self.examples)
        problem = self.make(everything, everything)
        problem.device = self.device
        return problem

    def _placed(self) -> list[BilevelProblem]:
        """The folds' problems on this one's device, which may have been set since."""
        # Shallow, so that no data are copied.
        placed = [copy.copy(problem) for problem in self.problems]
        for problem in placed:
            problem.device = self.device
        return placed

    def _upper(self, model: nn.Module, fold: int, hyperparameters: Hyperparameters) -> float:
        """F of one fold."""
        problem, total, examples = self.problems[fold], 0.0, 0
        for raw in make_batches(problem, "upper", None, plain(hyperparameters)):
            loss = upper_loss(problem, fold_of(model, fold), hyperparameters, move(raw, self.device, self.dtype))
            size = problem.batch_size(raw)
            total, examples = total + loss.item() * size, examples + size
        return total / examples


def times_held_out(splits: Iterable[tuple[Indices, Indices]]) -> float:
    """How often an example is held out, on average of those that are."""
    held_out = np.concatenate([np.asarray(held) for _, held in splits])
    return len(held_out) / len(np.unique(held_out))


def fold_of(model: nn.Module, fold: int) -> nn.Module:
    """The model of one fold."""
    assert isinstance(model, nn.ModuleList)
    return model[fold]


def plain(hyperparameters: Hyperparameters) -> dict[str, Any]:
    """Tensors as the numbers of a trial's config."""
    return {
        name: plain(value) if isinstance(value, Mapping) else value.item() if isinstance(value, Tensor) else value
        for name, value in hyperparameters.items()
    }
