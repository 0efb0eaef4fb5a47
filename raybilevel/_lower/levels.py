"""F(y) and f(x, y) of one model over all batches, their gradients, and what those cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from raybilevel.errors import NotFiniteError, ProblemError
from raybilevel.problem import Batch, BilevelProblem, Level, evaluate, leaves, move, upper_loss
from raybilevel.space import Space, flatten, nest


@dataclass(frozen=True)
class LevelValue:
    """One level at (x, y): its value and its gradients.

    gradient: one tensor per entry of what was differentiated, zeros where the level does not depend on it.
    """

    value: float
    gradient: tuple[Tensor, ...] = ()


@dataclass
class Levels:
    """Both levels of a problem at one model, whose parameters are y.

    `examples` counts every example whose gradient was taken, so that trainings, upper-level steps and linear
    solves are charged in one currency: `passes`, gradient evaluations of f over all lower-level data.
    """

    problem: BilevelProblem
    model: nn.Module
    examples: int = 0
    lower_examples: int = field(init=False)

    def __post_init__(self) -> None:
        self.lower_examples = sum(self.problem.batch_size(batch) for batch in self.problem.batches("lower", None))
        if self.lower_examples == 0:
            raise ProblemError(f"{type(self.problem).__name__}.batches('lower', None) yields no examples")

    @property
    def passes(self) -> float:
        return self.examples / self.lower_examples

    def evaluation_passes(self) -> float:
        """What one gradient of both levels costs, in gradient evaluations of f."""
        upper = sum(self.problem.batch_size(batch) for batch in self.problem.batches("upper", None))
        return 1 + upper / self.lower_examples

    def on_device(self, batch: Batch) -> Batch:
        return move(batch, self.problem.device, self.problem.dtype)

    def batch_loss(self, level: Level, hyperparameters: Mapping[str, Any], batch: Batch) -> Tensor:
        """The user's loss on one batch that is on the device."""
        if level == "upper":
            return upper_loss(self.problem, self.model, hyperparameters, batch)
        return self.problem.lower_loss(self.model, hyperparameters, batch)

    def value(self, level: Level, hyperparameters: Mapping[str, Any]) -> float:
        """A level's value, in eval mode, without gradients."""
        with torch.no_grad():
            return self._mean(level, hyperparameters, ()).value

    def gradient(self, level: Level, hyperparameters: Mapping[str, Any], wrt: Sequence[Tensor]) -> LevelValue:
        """A level's value and its gradient in `wrt`, in eval mode."""
        return self._mean(level, hyperparameters, wrt)

    def _mean(self, level: Level, hyperparameters: Mapping[str, Any], wrt: Sequence[Tensor]) -> LevelValue:
        self.model.eval()
        total, count, sums = self._sums(level, hyperparameters, wrt)
        if count == 0:
            raise ProblemError(f"{type(self.problem).__name__}.batches({level!r}, None) yields no examples")
        value = total / count
        if not math.isfinite(value):
            raise NotFiniteError(f"the {level}-level loss is {value}")
        return LevelValue(value, tuple(entry / count for entry in sums))

    def _sums(
        self, level: Level, hyperparameters: Mapping[str, Any], wrt: Sequence[Tensor]
    ) -> tuple[float, int, list[Tensor]]:
        """The sum of a level's losses over its examples, their number, and the sum of the losses' gradients."""
        total, count = 0.0, 0
        sums = [torch.zeros_like(tensor) for tensor in wrt]
        for raw in self.problem.batches(level, None):
            batch, size = self.on_device(raw), self.problem.batch_size(raw)
            loss = self.batch_loss(level, hyperparameters, batch)
            if wrt:
                gradients = torch.autograd.grad(loss, wrt, allow_unused=True)
                for entry, gradient in zip(sums, gradients, strict=True):
                    if gradient is not None:
                        entry.add_(gradient, alpha=size)
                self.examples += size
            total += loss.item() * size
            count += size
        return total, count, sums


def as_tensors(config: Mapping[str, Any], problem: BilevelProblem, requires_grad: bool = False) -> dict[str, Any]:
    """A trial's config with its floats as 0-dimensional tensors on the problem's device; the rest as it is."""
    return nest(
        {
            path: torch.tensor(value, dtype=problem.dtype, device=problem.device, requires_grad=requires_grad)
            if isinstance(value, float)
            else value
            for path, value in flatten(config).items()
        }
    )


def lower_gradient(levels: Levels, config: Mapping[str, Any]) -> dict[str, Any]:
    """df/dx at fixed weights, by Danskin's theorem dv/dx, nested as the config is, in the hyperparameters' own units.

    Floats that f does not depend on have gradient 0.

    Raises:
        NotFiniteError: f or an entry is NaN or infinite.
    """
    hyperparameters = as_tensors(config, levels.problem, requires_grad=True)
    searched = {path: value for path, value in flatten(hyperparameters).items() if isinstance(value, Tensor)}
    gradient = levels.gradient("lower", hyperparameters, list(searched.values())).gradient
    numbers = {path: entry.item() for path, entry in zip(searched, gradient, strict=True)}
    for path, number in numbers.items():
        if not math.isfinite(number):
            raise NotFiniteError(f"the lower level's gradient in {'/'.join(path)} is {number}")
    return nest(numbers)


def check_problem(problem: BilevelProblem, space: Space, constants: Mapping[str, Any] | None = None) -> None:
    """Try both levels on one batch at the centre of the space, before anything is trained.

    Raises:
        ProblemError: a loss is not a scalar that can be differentiated, there is no data, the lower-level loss does
            not depend on a hyperparameter that is searched, or a metric has a name that is taken.
        NotFiniteError: a loss is NaN or infinite at the start weights.
    """
    name = type(problem).__name__
    if not isinstance(problem.epochs, int) or problem.epochs < 1:
        raise ProblemError(f"{name}.epochs must be a whole number of at least 1, got {problem.epochs!r}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = problem.model()
        if not isinstance(model, nn.Module):
            raise ProblemError(f"{name}.model() must return a torch.nn.Module, got {type(model).__name__}")
        model = model.to(dtype=problem.dtype).eval()
        weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not weights:
            raise ProblemError(f"{name}.model() has no parameters to train")
        centre = torch.full((space.dimension,), 0.5, dtype=torch.double)
        config = {**flatten(constants or {}), **flatten(space.to_config(centre))}
        flat = {
            path: torch.tensor(value, dtype=problem.dtype, requires_grad=True) if isinstance(value, float) else value
            for path, value in config.items()
        }
        for level in ("lower", "upper"):
            raw = next(iter(problem.batches(level, None)), None)
            if raw is None or not any(True for _ in leaves(raw)):
                raise ProblemError(f"{name}.batches({level!r}, None) yields no tensors")
            batch = move(raw, "cpu", problem.dtype)
            loss = (
                problem.lower_loss(model, nest(flat), batch)
                if level == "lower"
                else upper_loss(problem, model, nest(flat), batch)
            )
            if not isinstance(loss, Tensor) or loss.dim() != 0:
                shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
                raise ProblemError(f"{name}.{level}_loss must return a tensor of shape (), got {shape}")
            if not math.isfinite(loss.item()):
                raise NotFiniteError(f"{name}.{level}_loss is {loss.item()} at the start weights; check data and model")
            if not loss.requires_grad:
                raise ProblemError(f"{name}.{level}_loss does not depend on the model's parameters")
            if level == "lower":
                searched = [flat[parameter.path] for parameter in space.parameters]
                gradients = torch.autograd.grad(loss, searched, allow_unused=True, retain_graph=True)
                for parameter, gradient in zip(space.parameters, gradients, strict=True):
                    if gradient is None:
                        raise ProblemError(
                            f"{parameter.name}: {name}.lower_loss does not depend on it, so it has no gradient to "
                            "follow; use it in lower_loss as a tensor (no float(), .item() or .detach()), or make it "
                            "a constant"
                        )
        if torch.device(problem.device).type == "cpu":  # else its data may lie on a device that is not here
            with torch.no_grad():
                evaluate(problem, model, nest(flat))
