"""Whether a problem can be descended on along hypergradients, told before anything runs."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.nn.utils import parameters_to_vector

from raybilevel._lower.levels import Levels
from raybilevel._lower.variables import ModuleVariables
from raybilevel.errors import NotFiniteError, ProblemError
from raybilevel.problem import BilevelProblem, LargeUpperLevel, SupportsShards


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
            else ("give at least one, e.g. tune.loguniform(1e-6, 1.0)")
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


def check_shards(problem: BilevelProblem, shards: int, in_box: bool) -> None:
    """Descents can see a part of the data each.

    Raises:
        ProblemError: x is a point of a box, whose descents have no number, or the problem cannot be divided at all.
        ConfigError: it cannot be divided into so many.
    """
    if shards == 1:
        return
    if in_box:
        raise ProblemError(f"shards={shards} is for upper_variables(); a search space's descents see all data")
    if not isinstance(problem, SupportsShards):
        raise ProblemError(f"{type(problem).__name__} has no shard(index, count), which shards={shards} needs")
    problem.shard(shards - 1, shards)
