"""What is tried before anything is trained: both levels of a problem at one point."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from raybilevel._lower.hooks import check_hooks
from raybilevel._lower.levels import Levels
from raybilevel._lower.random_numbers import forked_random
from raybilevel._lower.variables import ModuleVariables
from raybilevel.errors import NotFiniteError, ProblemError
from raybilevel.methods._base import Method
from raybilevel.problem import (
    Batch,
    BilevelProblem,
    LargeUpperLevel,
    Level,
    make_batches,
    make_model,
    make_schedule,
    move,
    on_cpu,
    trains_itself,
    upper_loss,
)
from raybilevel.search._calls import Given, calling, where_it_can_run
from raybilevel.search._fresh import check_fresh_model, check_unchanged, model_of_a_training, optimizer_of_a_training
from raybilevel.search._rehearsal import check_evaluate, rehearse
from raybilevel.search._repeatable import Measured, WatchedLevel, check_level_names, check_same_data, check_same_loss
from raybilevel.space import Space, flatten, nest

logger = logging.getLogger(__name__)


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
    """Call everything that a training will call, on a batch or two at the centre of the space, before anything is
    trained. It is done on the problem's device, or on the CPU where this machine lacks that.

    Constants that nothing reads are warned of.

    Returns the space, with the hyperparameters marked in which f is differentiable (`Parameter.smooth`). The others are
    searched by values of F.

    Raises:
        ProblemError: a part of the problem fails, is not the same at each call, or keeps something of a training; a
            loss is not a scalar that can be differentiated; there is no data; nothing reads a hyperparameter that is
            searched; or a metric has a name that is taken.
        NotFiniteError: a loss is NaN or infinite at the start weights.
    """
    name = type(problem).__name__
    for setting in ("epochs", "evaluate_every"):
        number = getattr(problem, setting)
        if not isinstance(number, int) or number < 1:
            raise ProblemError(f"{name}.{setting} must be a whole number of at least 1, got {number!r}")
    problem = where_it_can_run(problem)
    another_loop = problem.own_loop or trains_itself(problem)
    centre = torch.full((space.dimension,), 0.5, dtype=torch.double)
    config = {**flatten(constants or {}), **flatten(space.to_config(centre))}
    plain = Given(nest(config))
    with forked_random(problem.device):
        earlier, model = model_of_a_training(problem, plain), model_of_a_training(problem, plain)
        shared = check_fresh_model(problem, earlier, model)
        flat = {
            path: torch.tensor(value, dtype=problem.dtype, device=problem.device, requires_grad=True)
            if isinstance(value, float)
            else value
            for path, value in config.items()
        }
        given = Given(nest(flat), read=plain.read)
        model.eval()
        first = {
            level: check_same_data(problem, level, plain) for level in (WatchedLevel("lower"), WatchedLevel("upper"))
        }
        check_level_names(problem, first)
        smooth = check_loss(problem, model, "lower", first[WatchedLevel("lower")], given, flat, space)
        check_loss(problem, model, "upper", first[WatchedLevel("upper")], given, flat, space)
        if another_loop:
            check_evaluate(problem, model, given)
        else:
            optimizers = [optimizer_of_a_training(problem, one, plain) for one in (earlier, model)]
            before = {key: tensor.clone() for key, tensor in shared.items()}
            rehearse(problem, model, optimizers[1], given, plain)
            check_hooks(problem)
            with calling(problem, "schedule(optimizer)"):
                make_schedule(problem, optimizers[1], plain)
            check_unchanged(problem, shared, before)
    if not another_loop:  # which may read them
        unread = [p.name for p in space.parameters if p.path not in given.read]
        if unread:
            raise ProblemError(
                f"{', '.join(unread)}: nothing in {name} reads it, so that no search can tell what it does; use it in "
                "lower_loss or another method that is given the hyperparameters, leave it out of the space, or set "
                "own_loop if a Tune function of your own reads it"
            )
        if ignored := given.unread(constants or {}):
            logger.warning(
                "%s reads no %s: constants that nothing reads have no effect on a training; use them, e.g. in "
                "lower_loss, or leave them out", name, ", ".join(ignored),
            )  # fmt: skip
    return Space(tuple(replace(p, smooth=p.smooth and p.name in smooth) for p in space.parameters))


def check_loss(
    problem: BilevelProblem,
    model: nn.Module,
    level: Level,
    raw: Batch,
    given: Given,
    flat: Mapping[tuple[str, ...], Any],
    space: Space,
) -> frozenset[str]:
    """A level's loss and its gradients, twice, on a batch. The names of the searched hyperparameters in which it is
    differentiable.

    flat: what `given` holds, by path; floats as tensors that require gradients.
    """
    name = type(problem).__name__
    searched = {p.name: flat[p.path] for p in space.parameters if isinstance(flat[p.path], Tensor)}
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
            found = torch.autograd.grad(loss, [*searched.values(), *weights], allow_unused=True)
        in_x, in_y = found[: len(searched)], found[len(searched) :]
        dense = [torch.zeros_like(w) if g is None else g.to_dense() for w, g in zip(weights, in_y, strict=True)]
        return Measured(loss.detach(), in_x, parameters_to_vector(dense))

    once = measure()
    check_same_loss(problem, level, once, measure())
    return frozenset(name for name, entry in zip(searched, once.in_x, strict=True) if entry is not None)


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
