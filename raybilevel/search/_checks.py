"""What is tried before anything is trained: both levels of a problem at one point."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from raybilevel._lower.levels import Levels
from raybilevel._lower.variables import ModuleVariables
from raybilevel.errors import NotFiniteError, ProblemError
from raybilevel.methods._base import Method
from raybilevel.problem import BilevelProblem, LargeUpperLevel, evaluate, leaves, move, upper_loss
from raybilevel.space import Space, flatten, nest


def check_search(problem: BilevelProblem, space: Space, constants: Mapping[str, Any], method: Method) -> None:
    """Whether a method can search this problem over this space.

    Raises:
        ConfigError, ProblemError: the method cannot search this problem, or not over this space.
        ProblemError, NotFiniteError: as `check_problem`, or `check_upper_variables` where x is a module.
    """
    method.check(problem, space)
    if space.of_starts:
        check_upper_variables(problem, constants)
    else:
        check_problem(problem, space, constants)


def check_problem(problem: BilevelProblem, space: Space, constants: Mapping[str, Any] | None = None) -> None:
    """Try both levels on one batch at the centre of the space, before anything is trained.

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
        model, module = problem.model().to(problem.dtype), problem.upper_variables().to(problem.dtype)
    whole, problem = problem, copy.copy(problem)
    problem.device = "cpu"  # the driver may have no accelerator
    problem.batches = lambda level, generator: itertools.islice(whole.batches(level, generator), 1)  # type: ignore[method-assign]
    functions = Levels(problem, model, ModuleVariables(module, constants))
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
