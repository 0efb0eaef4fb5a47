"""What is tried before anything is trained: both levels of a problem at one point."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from raybilevel._lower.hooks import schedule_of_a_training
from raybilevel._lower.levels import Levels
from raybilevel._lower.random_numbers import forked_random
from raybilevel._lower.settings import check_settings
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
    on_cpu,
    trains_itself,
)
from raybilevel.search._calls import Given, calling, where_it_can_run
from raybilevel.search._fresh import (
    check_fresh_model,
    check_same_start,
    check_unchanged,
    model_of_a_training,
    optimizer_of_a_training,
    warn_of_scheduler,
)
from raybilevel.search._measured import Probe
from raybilevel.search._rehearsal import check_evaluate, rehearse
from raybilevel.search._repeatable import WatchedLevel, check_level_names, check_same_data
from raybilevel.space import Space, flatten, nest, sobol_points

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

    Constants that nothing reads are warned of, and so is a hyperparameter in which the gradient of f is exactly zero.

    Returns the space, with the hyperparameters marked in which f is differentiable (`Parameter.smooth`). The others are
    searched by values of F.

    Raises:
        ProblemError: a part of the problem fails, is not the same at each call, or keeps something of a training; a
            loss is not a scalar that can be differentiated; there is no data; nothing reads a hyperparameter that is
            searched; or a metric has a name that is taken.
        NotFiniteError: a loss is NaN or infinite at the start weights.
    """
    name = type(problem).__name__
    check_settings(problem)
    problem = where_it_can_run(problem)
    another_loop = problem.own_loop or trains_itself(problem)
    at = Points(problem, space, flatten(constants or {}))
    with forked_random(problem.device):
        plain = at.centre
        # Two models, as two trainings begin with.
        earlier, model = model_of_a_training(problem, plain), model_of_a_training(problem, plain)
        shared = check_fresh_model(problem, earlier, model)
        data = {
            level: check_same_data(problem, level, plain) for level in (WatchedLevel("lower"), WatchedLevel("upper"))
        }
        check_level_names(problem, data)
        probes = {level: at.probe(level) for level in data}
        at_start = {level: probes[level].check(model, look.first) for level, look in data.items()}
        given = at.given(at.entries(0))
        # As for every F and f that the search sees.
        model.eval()
        if another_loop:
            check_evaluate(problem, model, given)
        else:
            # In this order: an optimizer that the problem keeps would be that of the earlier model.
            optimizers = [optimizer_of_a_training(problem, one, plain) for one in (earlier, model)]
            warn_of_scheduler(problem, optimizers[1])
            before = {key: tensor.clone() for key, tensor in shared.items()}
            with calling(problem, "schedule(optimizer)"):
                schedule_of_a_training(problem, optimizers[1], plain)
            rehearse(problem, model, optimizers[1], given, plain)
            check_unchanged(problem, shared, before)
            later = model_of_a_training(problem, plain)
            check_same_start(problem, earlier, later)
            for level, was in at_start.items():
                raw = next(iter(make_batches(problem, level, None, plain)))  # type: ignore[arg-type]
                probes[level].check_nothing_kept(was, probes[level].draw(later, raw, 0))
        smooth = [p.name for p in space.parameters if at_start[WatchedLevel("lower")].in_x.get(p.name) is not None]
        dead = at.without_slope(earlier, smooth)
    if not another_loop:  # which may read them
        unread = [p.name for p in space.parameters if p.path not in plain.read]
        if unread:
            raise ProblemError(
                f"{', '.join(unread)}: nothing in {name} reads it, so that no search can tell what it does; use it in "
                "lower_loss or another method that is given the hyperparameters, leave it out of the space, or set "
                "own_loop if a Tune function of your own reads it"
            )
        if ignored := plain.unread(constants or {}):
            logger.warning(
                "%s reads no %s: constants that nothing reads have no effect on a training; use them, e.g. in "
                "lower_loss, or leave them out", name, ", ".join(ignored),
            )  # fmt: skip
    if dead:
        logger.warning(
            "%s: the gradient of %s.lower_loss in it is exactly zero at several points, so that it is searched by "
            "values of F; if it is no part of the loss, read it where it has an effect, e.g. in "
            "optimizer(self, model, hyperparameters)", ", ".join(dead), name,
        )  # fmt: skip
    return Space(tuple(replace(p, smooth=p.smooth and p.name in {*smooth} - {*dead}) for p in space.parameters))


class Points:
    """Hyperparameters at a few points of a space, as a problem gets them: the centre first. Others differ in what has a
    gradient only, so that they fit a model that was made at the centre.

    constants: by path.
    """

    def __init__(self, problem: BilevelProblem, space: Space, constants: Mapping[tuple[str, ...], Any]) -> None:
        self.problem, self.space = problem, space
        centre = flatten(space.to_config(torch.full((space.dimension,), 0.5, dtype=torch.double)))
        self.configs = [{**constants, **centre}]
        for unit in sobol_points(space.dimension, 2, seed=0):
            moved = {path: x for path, x in flatten(space.to_config(unit)).items() if isinstance(x, float)}
            self.configs.append({**self.configs[0], **moved})
        self.centre = Given(nest(self.configs[0]))

    def entries(self, point: int) -> dict[tuple[str, ...], Any]:
        """What the losses get, by path: floats as tensors that can be differentiated."""
        dtype, device = self.problem.dtype, self.problem.device
        return {
            path: torch.tensor(value, dtype=dtype, device=device, requires_grad=True)
            if isinstance(value, float)
            else value
            for path, value in self.configs[point].items()
        }

    def given(self, entries: Mapping[tuple[str, ...], Any]) -> Given:
        """The same, nested; what is read of it is noted as for the centre."""
        return Given(nest(entries), read=self.centre.read)

    def probe(self, level: str, point: int = 0) -> Probe:
        entries = self.entries(point)
        searched = {p.name: entries[p.path] for p in self.space.parameters if isinstance(entries[p.path], Tensor)}
        return Probe(self.problem, level, self.given(entries), searched)

    def without_slope(self, model: nn.Module, names: Sequence[str]) -> list[str]:
        """Of these hyperparameters, those in which the gradient of f is exactly zero on all data at all points, as of
        `loss + 0 * x`. The weights are moved, as a penalty on weights that start at zero has no slope there.

        model: its weights are changed.
        """
        with torch.no_grad():
            for weight in model.parameters():
                if weight.requires_grad:
                    weight.add_(0.01 * torch.randn_like(weight))
        left = list(names)
        for point in range(len(self.configs)):
            probe = self.probe("lower", point)
            batches = make_batches(self.problem, "lower", None, self.centre) if left else ()
            for raw in batches:
                try:
                    found = probe.draw(model, raw, 0).in_x
                except (NotFiniteError, ProblemError):  # at this point; who can tell
                    return []
                left = [name for name in left if (slope := found[name]) is None or slope == 0]
                if not left:
                    return []
        return left


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

    # Of the copy. A batch of each level is enough to see what it depends on.
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
