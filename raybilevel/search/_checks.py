"""What is tried before anything is trained: both levels of a problem at one point."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector

from raybilevel._lower.levels import Levels
from raybilevel._lower.variables import ModuleVariables
from raybilevel.errors import NotFiniteError, ProblemError
from raybilevel.methods._base import Method
from raybilevel.problem import (
    Batch,
    BilevelProblem,
    LargeUpperLevel,
    Level,
    evaluate,
    leaves,
    make_batches,
    make_model,
    make_optimizer,
    move,
    on_cpu,
    trains_itself,
    upper_loss,
)
from raybilevel.search._reads import Recorded
from raybilevel.space import Space, flatten, nest


def check_search(problem: BilevelProblem, space: Space, constants: Mapping[str, Any], method: Method) -> Space:
    """Whether a method can search this problem over this space; and the space, as `check_problem`.

    Raises:
        ConfigError, ProblemError: the method cannot search this problem, or not over this space.
        ProblemError, NotFiniteError: as `check_problem`, or `check_upper_variables` where x is a module.
    """
    if space.of_starts:
        method.check(problem, space)
        check_upper_variables(problem, constants)
        return space
    found = check_problem(problem, space, constants)
    method.check(problem, found)
    return found


def check_problem(problem: BilevelProblem, space: Space, constants: Mapping[str, Any] | None = None) -> Space:
    """Try both levels on one batch at the centre of the space, before anything is trained.

    Returns the space, with the hyperparameters marked in which f is differentiable (`Parameter.smooth`). The others are
    searched by values of F.

    Raises:
        ProblemError: a loss is not a scalar that can be differentiated, there is no data, the lower-level loss does
            not depend on a hyperparameter that is searched, or a metric has a name that is taken.
        NotFiniteError: a loss is NaN or infinite at the start weights.
    """
    name = type(problem).__name__
    for setting in ("epochs", "evaluate_every"):
        number = getattr(problem, setting)
        if not isinstance(number, int) or number < 1:
            raise ProblemError(f"{name}.{setting} must be a whole number of at least 1, got {number!r}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        centre = torch.full((space.dimension,), 0.5, dtype=torch.double)
        config = {**flatten(constants or {}), **flatten(space.to_config(centre))}
        plain = Recorded(nest(config))
        model = make_model(on_cpu(problem), plain).eval()
        weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not weights:
            raise ProblemError(f"{name}.model() has no parameters to train")
        flat = {
            path: torch.tensor(value, dtype=problem.dtype, requires_grad=True) if isinstance(value, float) else value
            for path, value in config.items()
        }
        given = Recorded(nest(flat), plain.read)
        make_optimizer(problem, model, plain)
        for level in ("lower", "upper"):
            raw = next(iter(make_batches(problem, level, None, plain)), None)
            if raw is None or not any(True for _ in leaves(raw)):
                raise ProblemError(f"{name}.batches({level!r}, None) yields no tensors")
            batch = move(raw, "cpu", problem.dtype)
            loss = (
                problem.lower_loss(model, given, batch)
                if level == "lower"
                else upper_loss(problem, model, given, batch)
            )
            if not isinstance(loss, Tensor) or loss.dim() != 0:
                shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
                raise ProblemError(f"{name}.{level}_loss must return a tensor of shape (), got {shape}")
            if not math.isfinite(loss.item()):
                raise NotFiniteError(f"{name}.{level}_loss is {loss.item()} at the start weights; check data and model")
            if not loss.requires_grad:
                raise ProblemError(f"{name}.{level}_loss does not depend on the model's parameters")
            if level == "lower":
                smooth = differentiable(loss, flat, space)
        if torch.device(problem.device).type == "cpu":  # else its data may lie on a device that is not here
            with torch.no_grad():
                evaluate(problem, model, given)
    unread = [p.name for p in space.parameters if p.name not in given.read]
    if unread and not (problem.own_loop or trains_itself(problem)):  # else the loop may read it
        raise ProblemError(
            f"{', '.join(unread)}: nothing in {name} reads it, so that no search can tell what it does; use it in "
            "lower_loss or another method that is given the hyperparameters, leave it out of the space, or set own_loop if "
            "a Tune function of your own reads it"
        )
    parameters = (replace(p, smooth=p.smooth and p.name in smooth) for p in space.parameters)
    return Space(tuple(parameters))


def differentiable(loss: Tensor, given: Mapping[tuple[str, ...], Any], space: Space) -> frozenset[str]:
    """Names of the searched hyperparameters in which f, on one batch, is differentiable.

    given: what the loss was given, by path; floats as tensors that require gradients.
    """
    tensors = {p.name: given[p.path] for p in space.parameters if isinstance(given[p.path], Tensor)}
    if not tensors:
        return frozenset()
    gradients = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True)
    return frozenset(name for name, gradient in zip(tensors, gradients, strict=True) if gradient is not None)


def check_upper_variables(problem: BilevelProblem, constants: Mapping[str, Any]) -> None:
    """Try both levels at the start, before any descent.

    Raises:
        ProblemError: there is no upper-level module, or f depends neither on it nor on the weights.
        NotFiniteError: a loss is NaN or infinite at the start.
    """
    name = type(problem).__name__
    if not isinstance(problem, LargeUpperLevel):
        hint = (
            "derive it from raybilevel.LargeUpperLevel"
            if hasattr(problem, "upper_variables")
            else "give at least one, e.g. tune.loguniform(1e-6, 1.0)"
        )
        raise ProblemError(
            f"{name} is no LargeUpperLevel with upper_variables(), and no hyperparameter to search was given; {hint}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, module = make_model(on_cpu(problem), constants), problem.upper_variables().to(problem.dtype)
    whole, problem = problem, on_cpu(problem)

    def one_batch(level: Level, generator: torch.Generator | None) -> Iterator[Batch]:
        return itertools.islice(make_batches(whole, level, generator, constants), 1)

    problem.batches = one_batch  # type: ignore[method-assign]
    functions = Levels(problem, model, ModuleVariables(module, constants), constants)
    x, y = parameters_to_vector(module.parameters()).detach(), functions.y
    lower, upper = functions.lower(x, y), functions.upper(x, y)
    for level, found in (("lower", lower), ("upper", upper)):
        if not math.isfinite(found.value):
            raise NotFiniteError(f"{name}.{level}_loss is {found.value} at the start; check data and model")
    mixed = functions.linearise(x, y).mixed(torch.ones_like(y))
    if not any(entry.any() for entry in (mixed, lower.in_x, upper.in_x)):
        raise ProblemError(
            f"{name}: neither loss depends on upper_variables(); use hyperparameters['upper'] in lower_loss"
        )
