"""What is tried before anything is trained: both levels of a problem at one point."""

from __future__ import annotations

import copy
import itertools
import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from raybilevel._lower.levels import Levels
from raybilevel._lower.training import forked_random
from raybilevel._lower.variables import ModuleVariables
from raybilevel.errors import NotFiniteError, ProblemError
from raybilevel.methods._base import Method
from raybilevel.problem import Batch, BilevelProblem, LargeUpperLevel, Level, move, upper_loss
from raybilevel.search._calls import Given, calling, where_it_can_run
from raybilevel.search._fresh import (
    check_fresh_model,
    check_unchanged,
    model_of_a_training,
    optimizer_of_a_training,
)
from raybilevel.search._rehearsal import rehearse
from raybilevel.search._repeatable import Measured, WatchedLevel, check_level_names, check_same_data, check_same_loss
from raybilevel.space import Space, flatten, nest

logger = logging.getLogger(__name__)


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
    """Call everything that a training will call, on a batch or two at the centre of the space, before anything is
    trained. It is done on the problem's device, or on the CPU where this machine lacks that.

    Constants that nothing reads are warned of.

    Raises:
        ProblemError: a part of the problem fails, is not the same at each call, or keeps something of a training; a
            loss is not a scalar that can be differentiated; there is no data; the lower-level loss does not depend on a
            hyperparameter that is searched; or a metric has a name that is taken.
        NotFiniteError: a loss is NaN or infinite at the start weights.
    """
    name = type(problem).__name__
    for setting in ("epochs", "evaluate_every"):
        number = getattr(problem, setting)
        if not isinstance(number, int) or number < 1:
            raise ProblemError(f"{name}.{setting} must be a whole number of at least 1, got {number!r}")
    problem = where_it_can_run(problem)
    with forked_random(problem.device):
        earlier, model = model_of_a_training(problem), model_of_a_training(problem)
        shared = check_fresh_model(problem, earlier, model)
        centre = torch.full((space.dimension,), 0.5, dtype=torch.double)
        config = {**flatten(constants or {}), **flatten(space.to_config(centre))}
        flat = {
            path: torch.tensor(value, dtype=problem.dtype, device=problem.device, requires_grad=True)
            if isinstance(value, float)
            else value
            for path, value in config.items()
        }
        given = Given(nest(flat))
        model.eval()
        first = {level: check_same_data(problem, level) for level in (WatchedLevel("lower"), WatchedLevel("upper"))}
        check_level_names(problem, first)
        check_loss(problem, model, "lower", first[WatchedLevel("lower")], given, flat, space)
        check_loss(problem, model, "upper", first[WatchedLevel("upper")], given, flat, space)
        optimizer = optimizer_of_a_training(problem, earlier), optimizer_of_a_training(problem, model)
        before = {key: tensor.clone() for key, tensor in shared.items()}
        rehearse(problem, model, optimizer[1], given)
        check_unchanged(problem, shared, before)
    if unread := given.unread(constants or {}):
        logger.warning(
            "%s reads no %s: constants that nothing reads have no effect on a training; use them, e.g. in lower_loss, "
            "or leave them out", name, ", ".join(unread),
        )  # fmt: skip


def check_loss(
    problem: BilevelProblem,
    model: nn.Module,
    level: Level,
    raw: Batch,
    given: Given,
    flat: Mapping[tuple[str, ...], Any],
    space: Space,
) -> None:
    """A level's loss and its gradients, twice, on a batch.

    flat: what `given` holds, by path; floats as tensors that require gradients.
    """
    name = type(problem).__name__
    searched = [flat[parameter.path] for parameter in space.parameters]
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    batch = move(raw, problem.device, problem.dtype)

    def measure() -> Measured:
        with calling(problem, f"{level}_loss"):
            if level == "lower":
                loss = problem.lower_loss(model, given, batch)
            else:
                loss = upper_loss(problem, model, given, batch)
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ProblemError(f"{name}.{level}_loss must return a tensor of shape (), got {shape}")
        if not math.isfinite(loss.item()):
            raise NotFiniteError(f"{name}.{level}_loss is {loss.item()} at the start weights; check data and model")
        if not loss.requires_grad:
            raise ProblemError(f"{name}.{level}_loss does not depend on the model's parameters")
        with calling(problem, f"{level}_loss, differentiated,"):
            found = torch.autograd.grad(loss, [*searched, *weights], allow_unused=True)
        in_x, in_y = found[: len(searched)], found[len(searched) :]
        dense = [torch.zeros_like(w) if g is None else g.to_dense() for w, g in zip(weights, in_y, strict=True)]
        return Measured(loss.detach(), in_x, parameters_to_vector(dense))

    once = measure()
    if level == "lower":
        for parameter, gradient in zip(space.parameters, once.in_x, strict=True):
            if gradient is None:
                raise ProblemError(
                    f"{parameter.name}: {name}.lower_loss does not depend on it, so it has no gradient to follow; use "
                    "it in lower_loss as a tensor (no float(), .item() or .detach()), or make it a constant"
                )
    check_same_loss(problem, level, once, measure())


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
