"""The bilevel problem, as a user writes it."""

from __future__ import annotations

import copy
import inspect
import itertools
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property, lru_cache
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from raybilevel._metrics import check_metrics
from raybilevel.errors import ProblemError
from raybilevel.space import Space

__all__ = [
    "Batch",
    "BilevelProblem",
    "Hyperparameters",
    "LargeUpperLevel",
    "Level",
    "Report",
    "SupportsAllExamples",
    "SupportsHalves",
    "SupportsLowerMap",
    "SupportsRepeats",
    "SupportsShards",
    "SupportsTraining",
    "evaluate",
    "leaves",
    "losses_on_test",
    "make_batches",
    "make_model",
    "make_optimizer",
    "make_refit_batches",
    "make_schedule",
    "minibatches",
    "move",
    "on_cpu",
    "trains_itself",
    "upper_loss",
]

Level = Literal["lower", "upper"]
"""Which data: "lower" for training, "upper" for validation."""
Batch = Any
"""A tensor, or tuples, lists and dicts of tensors, nested."""
Hyperparameters = Mapping[str, Any]
"""Tensors of shape (), named and nested as the search space. Values that are no floats are as in the trial's config."""


class BilevelProblem(ABC):
    """Choose hyperparameters x so that the weights y trained with them do well on other data.

        min_{x, y} F(x, y)   subject to   y in argmin_y' f(x, y')

    F, the upper level, is the mean of `upper_loss` over the upper batches, the validation data. f, the lower level, is
    the mean of `lower_loss` over the lower batches, the training data, regularisers included. Means are weighted by
    `batch_size`. During a training run the model is in `train()` mode. F, f and their gradients are taken in `eval()`
    mode. Training runs in one process share the problem, which reaches each process once. Keep nothing of a training
    run in it. A problem with a method `train` trains itself; see `SupportsTraining`.

    `model`, `optimizer`, `schedule`, `batches` and `refit_batches` may ask for the hyperparameters, too: `model(self,
    hyperparameters)`, `optimizer(self, model, hyperparameters)`, `batches(self, level, generator, hyperparameters)` and
    `refit_batches(self, generator, hyperparameters)`. They get plain values as the trial's config holds them, constants
    included, named and nested as the search space: so that widths, learning rates and batch sizes can be searched.

    epochs: passes over the lower batches in one training run.
    clip: the largest norm of a gradient, which is scaled down to it; None for no limit.
    accumulate: batches whose mean gradient makes one step of the optimizer.
    schedule_interval: the scheduler of `schedule` is stepped after each "epoch" or after each "step" of the optimizer.
    patience: evaluations of F in a row without a new lowest one after which a training run ends. It ends with the
        weights of the lowest F, which then have seen the upper level's data, so judge them by other data. None for
        training runs of `epochs`.
    autocast: torch.bfloat16 or torch.float16, in which the steps of a training run compute, as under `torch.autocast`;
        with float16 gradients are scaled. None for `dtype`. F, f, `evaluate` and hypergradients are taken in `dtype`.
    ema: decay of an exponential moving average of the weights, which is what is evaluated, differentiated and kept;
        None for the weights themselves.
    own_loop: training runs are by a Tune function of your own, which ends with `raybilevel.conclude` and may read
        hyperparameters that no method of the problem reads.
    upper_metric: the name under which a script of your own reports F, e.g. "val_loss". A search of this metric has
        hypergradients, and F is reported under this name, too.
    evaluate_every: epochs between evaluations of F, f and `evaluate`, each a pass over the data without gradients.
        A training run reports, and may be stopped or saved, after these epochs and the last.
    device, dtype: where and in which precision a training run computes. Batches are moved and cast to them.
    upper_likelihood: what F is, which tells the search how much of it is chance. "log_likelihood" is a mean negative
        log-likelihood of independent examples (cross-entropy), "squared_error" a multiple of a mean squared error of
        one target an example, and "none" is neither. "auto" tells by the torch function that `upper_loss` ends in.
    optimistic: if many y minimise f, take the one with the lowest F, as the problem above says, and not the one that
        the training run happens to reach. Each training run then continues, at up to twice the cost. Its weights have
        seen the upper level's data, so judge them by other data.
    """

    epochs: int = 50
    clip: float | None = None
    accumulate: int = 1
    schedule_interval: Literal["epoch", "step"] = "epoch"
    patience: int | None = None
    autocast: torch.dtype | None = None
    ema: float | None = None
    own_loop: bool = False
    upper_metric: str = "upper_loss"
    evaluate_every: int = 1
    device: str | torch.device = "cpu"
    dtype: torch.dtype = torch.float32
    upper_likelihood: Literal["auto", "log_likelihood", "squared_error", "none"] = "auto"
    optimistic: bool = False

    @cached_property  # which, unlike a property, leaves it to a problem to set an attribute of this name
    def space(self) -> Space | None:
        """The problem's own box of hyperparameters, which comparisons search; None: the search space is the user's."""
        return None

    @abstractmethod
    def model(self, *args: Any, **kwargs: Any) -> nn.Module:
        """A fresh model; its parameters are the lower-level variable y. Called under a fixed seed. Define it as
        `model(self)` or as `model(self, hyperparameters)`."""

    @abstractmethod
    def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Batch) -> Tensor:
        """f on one batch, shape (), differentiable in the hyperparameters and in the model's parameters.

        hyperparameters: floats in the trial's config as tensors of shape (), named and nested as the space is.
        """

    @abstractmethod
    def upper_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """F on one batch, shape (). Define it as `upper_loss(self, model, batch)`. If F depends on x itself, and not
        through the weights only, define it as `upper_loss(self, model, hyperparameters, batch)`."""

    @abstractmethod
    def batches(self, level: Level, generator: torch.Generator | None, *args: Any, **kwargs: Any) -> Iterable[Batch]:
        """One pass over a level's data: shuffled by the generator if there is one, in a fixed order if it is None.
        Define it as `batches(self, level, generator)` or as `batches(self, level, generator, hyperparameters)`."""

    def optimizer(self, model: nn.Module, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """What trains y: any torch optimizer. It is stepped with a closure, so L-BFGS works too. By default it is SGD
        with a rate of 0.1 and Nesterov momentum of 0.9. Define it as `optimizer(self, model)` or as
        `optimizer(self, model, hyperparameters)`."""
        return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)

    def schedule(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> LRScheduler | None:
        """A learning-rate scheduler of torch, stepped after each `schedule_interval`; one that waits for a plateau gets
        F. Define it as `schedule(self, optimizer)` or as `schedule(self, optimizer, hyperparameters)`."""
        return None

    def evaluate(self, model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Further metrics of a model, e.g. {"test_loss": ...}, reported with every epoch. Define it as
        `evaluate(self, model)` or as `evaluate(self, model, hyperparameters)`. The model is in `eval()` mode.

        Names that raybilevel or Ray Tune reports itself, e.g. "upper_loss" or "training_iteration", are refused."""
        return {}

    def test_losses(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor | None:
        """The loss of each test example, shape (n,), in a fixed order; None if they are not known. `test_loss` of
        `evaluate` is their mean. At the end of a run they tell whether its gain may be chance. Define it as
        `test_losses(self, model)` or as `test_losses(self, model, hyperparameters)`. The model is in `eval()` mode."""
        return None

    def refit_batches(self, generator: torch.Generator | None, *args: Any, **kwargs: Any) -> Iterable[Batch] | None:
        """One pass over training plus validation data, for the final refit. None if a refit makes no sense. Define it
        as `refit_batches(self, generator)` or as `refit_batches(self, generator, hyperparameters)`."""
        return None

    def batch_size(self, batch: Batch) -> int:
        """Examples in a batch: the length of its first tensor."""
        for leaf in leaves(batch):
            return len(leaf) if leaf.dim() else 1
        return 1


class LargeUpperLevel(BilevelProblem):
    """A problem whose upper level is too large for a search space, for method "hypergradient".

    The upper-level variable x is all parameters of a module: filters, edges, a network that weights examples. The
    losses find the module as hyperparameters["upper"].
    """

    @abstractmethod
    def upper_variables(self) -> nn.Module:
        """A fresh module whose parameters are x. Called under a fixed seed, another one for each start."""

    def selection_loss(self, model: nn.Module, hyperparameters: Hyperparameters) -> float | None:
        """What chooses among the x on the way of a descent, the lowest: a loss on data that neither level sees, where x
        has variables enough to fit the upper level's. None: F."""
        return None


@runtime_checkable
class SupportsLowerMap(Protocol):
    """A problem whose lower level is a fixed point y = g(x, y), an equilibrium, and not a minimum (method
    "hypergradient" with lower "fixed_point"). Its `lower_loss` is then some measure of y - g(x, y)."""

    def lower_map(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Batch) -> Tensor:
        """g at the model's parameters y: shape (rows, n / rows), the parameters in their order; rows are independent of
        each other, e.g. examples."""


@runtime_checkable
class SupportsRepeats(Protocol):
    """A problem whose upper level has its examples several times, as repeated cross-validation has.

    upper_repeats: how often each, on average. Chance in F is that of the examples, however often they are taken.
    """

    upper_repeats: float


class Report(Protocol):
    """What a problem that trains itself calls to tell of a training in progress, as often as it likes."""

    def __call__(
        self,
        metrics: Mapping[str, Any],
        model: nn.Module | None = None,
        checkpoint: Mapping[str, Any] | None = None,
        trained_time: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Report metrics by name; a scheduler of Tune may end the training here. "lower_passes" are the gradient
        evaluations of f so far, over all data, where the problem takes its batches elsewhere than of `batches`.

        model:      F, f and the problem's `evaluate` at its weights are added. A search for the lowest `upper_loss`
            needs either the model or a metric of this name.
        checkpoint: tensors and plain values that `train` is given again after a fault.
        trained_time: for how long each tensor of weights was trained so far, by its name; shape () or that of the
            tensor. A step of gradient descent takes its rate, with momentum m 1 / (1 - m) times that. Hypergradients
            go by the last that is reported, and without any as if the training ended at a minimum.
        """


class SupportsTraining(Protocol):
    """A problem that trains itself, by a loop of its own."""

    def train(self, config: Mapping[str, Any], report: Report, checkpoint: Mapping[str, Any] | None) -> nn.Module:
        """The trained model, of the kind that `model` makes of the config. It starts cold: from weights that follow
        from the config and torch's random numbers, which are seeded, and from no other training.

        config:     the trial's, plain values.
        checkpoint: what `report` was last given, if the training was interrupted; None at the start.
        """


@runtime_checkable
class SupportsShards(Protocol):
    """A problem that can be divided, for descents that see a part of the data each (setting `shards`)."""

    def shard(self, index: int, count: int) -> BilevelProblem:
        """This problem on part `index` of `count` parts of its data. The upper-level variables are the same; the lower
        level's may be others, e.g. fewer images."""


@runtime_checkable
class SupportsAllExamples(Protocol):
    """A problem whose examples are split in several ways, of which a refit uses all."""

    def on_all_examples(self) -> BilevelProblem:
        """The problem whose lower level has all examples."""


@runtime_checkable
class SupportsHalves(Protocol):
    """A problem whose validation examples can be halved. Before a refit, hyperparameters are then judged by trainings
    on more examples than those of the search."""

    def halves(self) -> Iterable[BilevelProblem]:
        """The problem twice: its lower level has the training examples and one half of the validation examples, its
        upper level the other half. Without `patience`, as a refit has none."""


def trains_itself(problem: object) -> bool:
    """Whether a problem has a `train` of its own."""
    # On the class: of a problem, `train` may be the number of its training examples.
    return callable(getattr(type(problem), "train", None))


def upper_loss(problem: BilevelProblem, model: nn.Module, hyperparameters: Hyperparameters, batch: Batch) -> Tensor:
    """F of a problem on one batch, whichever form its `upper_loss` has."""
    if takes_hyperparameters(problem.upper_loss, others=2):
        return problem.upper_loss(model, hyperparameters, batch)
    return problem.upper_loss(model, batch)


def evaluate(problem: BilevelProblem, model: nn.Module, hyperparameters: Hyperparameters) -> dict[str, float]:
    """A problem's further metrics as floats, whichever form its `evaluate` has.

    Raises:
        ProblemError: it returned something else than numbers by name, or one under a name that is taken.
    """
    if takes_hyperparameters(problem.evaluate, others=1):
        found = problem.evaluate(model, hyperparameters)
    else:
        found = problem.evaluate(model)
    return check_metrics(type(problem).__name__, found)


def losses_on_test(problem: BilevelProblem, model: nn.Module, hyperparameters: Hyperparameters) -> Tensor | None:
    """A problem's losses of test examples, whichever form its `test_losses` has.

    Raises:
        ProblemError: it returned something else than a tensor of shape (n,).
    """
    if takes_hyperparameters(problem.test_losses, others=1):
        found = problem.test_losses(model, hyperparameters)
    else:
        found = problem.test_losses(model)
    if found is not None and not (isinstance(found, Tensor) and found.dim() == 1):
        got = f"one of shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise ProblemError(f"{type(problem).__name__}.test_losses must return a tensor of shape (n,), got {got}")
    return found


def on_cpu(problem: BilevelProblem) -> BilevelProblem:
    """A copy that makes its model on the CPU, where a process may have no accelerator."""
    problem = copy.copy(problem)
    problem.device = "cpu"
    return problem


def make_model(problem: BilevelProblem, config: Mapping[str, Any]) -> nn.Module:
    """A fresh model of a problem on its device, whichever form its `model` has.

    config: plain values, constants included, nested as the search space; likewise below.

    Raises:
        ProblemError: it is no module, or has complex tensors.
    """
    name = type(problem).__name__
    found = problem.model(config) if takes_hyperparameters(problem.model, others=0) else problem.model()
    if not isinstance(found, nn.Module):
        raise ProblemError(f"{name}.model() must return a torch.nn.Module, got {type(found).__name__}")
    for key, tensor in itertools.chain(found.named_parameters(), found.named_buffers()):
        if tensor.is_complex():  # which the cast below would strip of its imaginary part
            raise ProblemError(
                f"{name}.model(): {key} is complex, and weights and buffers are real numbers of the problem's dtype; "
                "keep torch.view_as_real of it, and take torch.view_as_complex where it is used"
            )
    return found.to(problem.device, problem.dtype)


def make_optimizer(problem: BilevelProblem, model: nn.Module, config: Mapping[str, Any]) -> torch.optim.Optimizer:
    """The optimizer of a training, whichever form the problem's `optimizer` has."""
    if takes_hyperparameters(problem.optimizer, others=1):
        return problem.optimizer(model, config)
    return problem.optimizer(model)


def make_schedule(
    problem: BilevelProblem, optimizer: torch.optim.Optimizer, config: Mapping[str, Any]
) -> LRScheduler | None:
    """The learning-rate scheduler of a training, whichever form the problem's `schedule` has."""
    if takes_hyperparameters(problem.schedule, others=1):
        return problem.schedule(optimizer, config)
    return problem.schedule(optimizer)


def make_batches(
    problem: BilevelProblem, level: Level, generator: torch.Generator | None, config: Mapping[str, Any]
) -> Iterable[Batch]:
    """One pass over a level's data, whichever form the problem's `batches` has."""
    if takes_hyperparameters(problem.batches, others=2):
        return problem.batches(level, generator, config)
    return problem.batches(level, generator)


def make_refit_batches(
    problem: BilevelProblem, generator: torch.Generator | None, config: Mapping[str, Any]
) -> Iterable[Batch] | None:
    """One pass over training plus validation data, whichever form the problem's `refit_batches` has."""
    if takes_hyperparameters(problem.refit_batches, others=1):
        return problem.refit_batches(generator, config)
    return problem.refit_batches(generator)


def takes_hyperparameters(method: Callable[..., Any], others: int) -> bool:
    """Whether a problem's method asks for the hyperparameters beside its `others` arguments: it has a parameter of that
    name, or more than so many without a default."""
    # The function is what the cache below keeps. A bound method would keep its problem alive.
    function = getattr(method, "__func__", None)
    return _takes_hyperparameters(method, others) if function is None else _takes_hyperparameters(function, others + 1)


@lru_cache(maxsize=256)
def _takes_hyperparameters(function: Callable[..., Any], others: int) -> bool:
    parameters = inspect.signature(function).parameters
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    # A parameter with a default is the problem's own business, unless it has the name.
    needed = [p for p in parameters.values() if p.kind in positional and p.default is p.empty]
    return "hyperparameters" in parameters or len(needed) > others


def leaves(batch: Batch) -> Iterator[Tensor]:
    """The tensors of a batch made of tuples, lists and dicts, in order."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from leaves(value)
    elif isinstance(batch, tuple | list):
        for value in batch:
            yield from leaves(value)


def move(batch: Batch, device: str | torch.device, dtype: torch.dtype) -> Batch:
    """The batch on a device, its floating-point tensors in a precision."""
    if isinstance(batch, Tensor):
        return batch.to(device, dtype) if batch.is_floating_point() else batch.to(device)
    if isinstance(batch, Mapping):
        return {key: move(value, device, dtype) for key, value in batch.items()}
    # A named tuple takes its fields one by one.
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(move(value, device, dtype) for value in batch))
    if isinstance(batch, tuple | list):
        return type(batch)(move(value, device, dtype) for value in batch)
    return batch


def minibatches(
    tensors: tuple[Tensor, ...], size: int | None, generator: torch.Generator | None
) -> Iterator[tuple[Tensor, ...]]:
    """Batches of `size` rows (None: all rows at once) of tensors of equal length, shuffled by the generator."""
    rows = len(tensors[0])
    if size is None or size >= rows:
        # One batch has no order to shuffle.
        yield tensors
        return
    order = torch.arange(rows) if generator is None else torch.randperm(rows, generator=generator)
    # The size may be a number of NumPy, which torch does not take.
    for chosen in order.split(operator.index(size)):
        yield tuple(tensor[chosen] for tensor in tensors)
