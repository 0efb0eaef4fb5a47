"""What is tried before anything is trained: both levels of a problem at one point."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from raybilevel._lower.hooks import schedule_of_a_training
from raybilevel._lower.levels import Levels
from raybilevel._lower.random_numbers import forked_random
from raybilevel._lower.settings import check_settings
from raybilevel._lower.variables import BoxVariables, ModuleVariables
from raybilevel._tree import Path, leaves, replaced
from raybilevel.errors import NotFiniteError, ProblemError
from raybilevel.methods._base import Method
from raybilevel.problem import (
    Batch,
    BilevelProblem,
    LargeUpperLevel,
    Level,
    evaluate,
    make_batches,
    make_model,
    on_cpu,
    trains_itself,
)
from raybilevel.search._calls import Given, calling, where_it_can_run
from raybilevel.search._first_derivatives import Contradiction, contradictions
from raybilevel.search._fresh import (
    check_fresh_model,
    check_same_start,
    check_unchanged,
    model_of_a_training,
    optimizer_of_a_training,
    optimizers_of_trainings,
    warn_of_scheduler,
)
from raybilevel.search._functions import followed_by_functions, read_by_functions
from raybilevel.search._measured import Measured, Probe, agree, difference, rounded_away
from raybilevel.search._rehearsal import check_evaluate, rehearse
from raybilevel.search._repeatable import WatchedLevel, check_level_names, check_same_data, warn_of_same_data
from raybilevel.space import Space, flatten, nest, sobol_points

logger = logging.getLogger(__name__)

NEAR_ENDS = 0.05
"""Of the unit cube, from both ends of a space: a clamped hyperparameter has an effect near one of them only."""


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
    trained; of a conditional space at a point of each of its parts. It is done on the problem's device, or on the CPU
    where this machine lacks that.

    Constants that nothing reads are warned of, and so is a hyperparameter in f that changes no gradient in the weights.

    Returns the space, with the hyperparameters marked in which a loss is differentiable (`Parameter.smooth`). Others
    are searched by values of F. So are those that `sample_from` functions follow, or on which the model, the optimizer
    or the batches depend as well.

    Raises:
        ProblemError: a part of the problem fails, is not the same at each call, or keeps something of a training; a
            loss is not a scalar that can be differentiated; there is no data; nothing reads a hyperparameter that is
            searched; or a metric has a name that is taken.
        NotFiniteError: a loss is NaN or infinite at the start weights.
    """
    name = type(problem).__name__
    check_settings(problem)
    problem = where_it_can_run(problem)
    smooth, dead, read, of_functions = set[str](), set[str](), set[Path](), read_by_functions(space, constants or {})
    for point in space.representatives():
        found = check_at(problem, space, constants or {}, point)
        smooth, dead, read = smooth | found.smooth, dead | found.dead, read | found.read
    # One with a slope at any of these points is not dead.
    dead -= smooth
    if not (problem.own_loop or trains_itself(problem)):  # which may read them
        unread = [p.name for p in space.parameters if not p.switch and in_dicts(p.path) not in read | of_functions]
        if unread:
            raise ProblemError(
                f"{', '.join(unread)}: nothing in {name} reads it, so that no search can tell what it does; use it in "
                "lower_loss or another method that is given the hyperparameters, leave it out of the space, or set "
                "own_loop if a Tune function of your own reads it"
            )
        if ignored := Given({}, read={*read, *of_functions}).unread(constants or {}):
            logger.warning(
                "%s reads no %s: constants that nothing reads have no effect on a training; use them, e.g. in "
                "lower_loss, or leave them out", name, ", ".join(ignored),
            )  # fmt: skip
    if dead:
        logger.warning(
            "%s: it changes nothing in the gradient of %s.lower_loss in the weights, so that it is searched by values "
            "of F; if it is no part of the loss, read it where it has an effect, e.g. in "
            "optimizer(self, model, hyperparameters)", ", ".join(p.name for p in space.parameters if p.name in dead),
            name,
        )  # fmt: skip
    followed = followed_by_functions(space, constants or {})
    marked = (replace(p, smooth=p.smooth and p.name in smooth and p.path not in followed) for p in space.parameters)
    return replace(space, parameters=tuple(marked))


def metric_names(problem: BilevelProblem, space: Space, constants: Mapping[str, Any]) -> set[str]:
    """The names of what a problem's `evaluate` returns, asked of a model at the start weights."""
    problem = where_it_can_run(problem)
    at = Points(problem, space, constants, next(iter(space.representatives())))
    with forked_random(problem.device), torch.no_grad():
        model = model_of_a_training(problem, at.first).eval()
        return set(evaluate(problem, model, at.given(at.entries(0))))


@dataclass(frozen=True)
class Looked:
    """What a check at one point saw.

    smooth: the names of hyperparameters in which a loss is differentiable, with a gradient that is not always zero.
    dead:   the names of those in which it always is.
    read:   what of the config was read.
    """

    smooth: frozenset[str]
    dead: frozenset[str]
    read: set[Path]


def in_dicts(path: Path) -> Path:
    """The part of a path that leads through dicts: who reads a list has read what is in it."""
    return tuple(itertools.takewhile(lambda key: isinstance(key, str), path))


def check_at(problem: BilevelProblem, space: Space, constants: Mapping[str, Any], point: Tensor) -> Looked:
    """The checks of `check_problem` at a point of the unit cube, shape (d,)."""
    another_loop = problem.own_loop or trains_itself(problem)
    at = Points(problem, space, constants, point)
    with forked_random(problem.device):
        plain = at.first
        # Two models, as two trainings begin with.
        earlier, model = model_of_a_training(problem, plain), model_of_a_training(problem, plain)
        shared = check_fresh_model(problem, earlier, model)
        data = {
            level: check_same_data(problem, level, plain) for level in (WatchedLevel("lower"), WatchedLevel("upper"))
        }
        # Before a level is looked up by another object of its name, which compares names as well.
        check_level_names(problem, data)
        probes = {level: at.probe(level) for level in data}
        # So far by `model` and `batches`. The losses get tensors.
        read_as_values = set(plain.read)
        # Both levels and their gradients, twice each.
        at_start = {level: probes[level].check(model, look.first) for level, look in data.items()}
        upper = WatchedLevel("upper")
        probes[upper].warn_of_sum(model, data[upper].first, data[upper].last)
        warn_of_same_data(problem, data, lambda level, batch: probes[level].single(model, batch))
        # Whatever f was evaluated at before.
        with suppress(NotFiniteError, ProblemError):  # at other hyperparameters
            at.probe("lower", 1).draw(model, data[WatchedLevel("lower")].first, 0)
        probes[upper].check_own(at_start[upper], probes[upper].draw(model, data[upper].first, 0))
        given = at.given(at.entries(0))
        # As for every F and f that the search sees. In train mode dropout would differ from call to call.
        model.eval()
        # A loop of one's own need not use the problem's optimizer and hooks.
        if another_loop:
            check_evaluate(problem, model, given)
        else:
            of_optimizer = Given(at.configs[0])
            optimizers = optimizers_of_trainings(problem, (earlier, model), of_optimizer)
            read_as_values |= of_optimizer.read
            plain.read.update(of_optimizer.read)
            warn_of_scheduler(problem, optimizers[1])
            # Steps of a training, and what they must not change.
            before = {key: tensor.clone() for key, tensor in shared.items()}
            with calling(problem, "schedule(optimizer)"):
                schedule_of_a_training(problem, optimizers[1], plain)
            rehearse(problem, model, optimizers[1], given, plain)
            check_unchanged(problem, shared, before)
            # What the step has left behind shows in the next model, and in the losses at its weights.
            later = model_of_a_training(problem, plain)
            check_same_start(problem, earlier, later)
            for level, was in at_start.items():
                raw = next(iter(make_batches(problem, level, None, plain)))  # type: ignore[arg-type]
                probes[level].check_nothing_kept(was, probes[level].draw(later, raw, 0))
        in_f, in_upper = (at_start[level].in_x for level in (WatchedLevel("lower"), upper))
        # F itself may have a slope in x.
        size, searched = at_start[upper].loss.abs().item(), probes[upper].searched
        direct = {
            name
            for name, slope in in_upper.items()
            if slope is not None and not rounded_away(slope, searched[name], size)
        }
        indirect = [name for name, slope in in_f.items() if slope is not None and name not in direct]
        dead = frozenset(at.without_effect(earlier, indirect))
        smooth = (direct | set(indirect)) - dead
        # A loop of one's own says what it reads to nobody.
        elsewhere = {} if another_loop else at.elsewhere(model, smooth, probes, at_start, read_as_values)
        smooth -= elsewhere.keys()
        followed = followed_by_functions(space, constants)
        seen = [p.name in smooth and p.path not in followed for p in space.parameters]
        found = contradictions(problem, earlier, BoxVariables(space, constants), at.configs[0], point, indices(seen))
        smooth -= warn_of_contradictions(type(problem).__name__, found, space)
        for name, part in elsewhere.items():
            logger.warning(
                "%s: %s.%s depends on it as well, so that gradients of the losses are not its whole effect, and it is "
                "searched by values of F; for gradients make two hyperparameters of it",
                name, type(problem).__name__, part,
            )  # fmt: skip
    return Looked(frozenset(smooth), dead, plain.read)


def indices(chosen: Sequence[bool]) -> list[int]:
    return [index for index, each in enumerate(chosen) if each]


def promised(share: float) -> str:
    """share: of the change that a gradient promises."""
    return f"by {share:.2g} of what its gradient says" if math.isfinite(share) else "while its gradient is 0"


def warn_of_contradictions(problem: str, found: Sequence[Contradiction], space: Space) -> set[str]:
    """The names of hyperparameters whose hypergradients would be wrong: all, where a gradient in the weights is."""
    for level, coordinate, share in found:
        if coordinate is None:
            logger.warning(
                "%s.%s_loss changes with the weights %s, over lengths of several magnitudes, so that hypergradients "
                "would be wrong and the search goes by values of F; is a value rounded, its gradient passed straight "
                "through, or a part detached? Take the losses that are searched of the smooth model, if you can",
                problem, level, promised(share),
            )  # fmt: skip
        else:
            logger.warning(
                "%s: %s.%s_loss changes with it by %.2g of what its gradient says, over lengths of several magnitudes, "
                "so that it is searched by values of F; some use of it is rounded, or hidden from gradients by "
                "float(), .item() or .detach()", space.parameters[coordinate].name, problem, level, share,
            )  # fmt: skip
    wrong = {space.parameters[coordinate].name for _, coordinate, _ in found if coordinate is not None}
    return wrong if all(c is not None for _, c, _ in found) else {p.name for p in space.parameters}


class Points:
    """Hyperparameters at a few points of a space, as a problem gets them. All differ from the first in what has a
    gradient only, so that they fit a model that was made at the first.

    constants: around the space, nested.
    first:     a point of the unit cube, shape (d,).
    """

    def __init__(self, problem: BilevelProblem, space: Space, constants: Mapping[str, Any], first: Tensor) -> None:
        self.problem, self.space = problem, space
        config = nest({**flatten(constants), **flatten(space.to_config(first))})
        self.configs = [config]
        ends = torch.tensor([[NEAR_ENDS], [1 - NEAR_ENDS]], dtype=torch.double).expand(2, space.dimension).clone()
        for unit in torch.cat([sobol_points(space.dimension, 2, seed=0), ends]):
            for coordinate in space.discrete:
                unit[coordinate] = first[coordinate]
            moved = {path: x for path, x in leaves(space.to_config(unit)).items() if isinstance(x, float)}
            self.configs.append(replaced(config, moved))
        self.first = Given(config)

    def entries(self, point: int) -> dict[Path, Tensor]:
        """The floats of a config by path, as tensors that can be differentiated."""
        dtype, device = self.problem.dtype, self.problem.device
        return {
            path: torch.tensor(value, dtype=dtype, device=device, requires_grad=True)
            for path, value in leaves(self.configs[point]).items()
            if isinstance(value, float)
        }

    def given(self, entries: Mapping[Path, Tensor]) -> Given:
        """The config with them; what is read of it is noted as for the first."""
        # One set for both: a hyperparameter may be read by `model`, as a plain value, or by a loss, as a tensor.
        return Given(replaced(self.configs[0], entries), read=self.first.read)

    def probe(self, level: str, point: int = 0) -> Probe:
        entries = self.entries(point)
        # Whole numbers and choices are plain values, in which there is no gradient to ask for.
        searched = {p.name: entries[p.path] for p in self.space.parameters if p.path in entries}
        return Probe(self.problem, level, self.given(entries), searched)

    def elsewhere(
        self,
        model: nn.Module,
        names: Collection[str],
        probes: Mapping[WatchedLevel, Probe],
        at_start: Mapping[WatchedLevel, Measured],
        read: Collection[Path],
    ) -> dict[str, str]:
        """Of these hyperparameters, those that a training depends on outside of the losses as well, with the part of
        the problem that is another one at another value.

        read: what of the config was read as plain values.
        """
        found = {}
        for p in self.space.parameters:
            if p.name in names and in_dicts(p.path) in read and p.path in self.entries(0):
                moved = replaced(self.configs[0], {p.path: leaves(self.configs[1])[p.path]})
                if part := self.other_part(moved, model, probes, at_start):
                    found[p.name] = part
        return found

    def other_part(
        self,
        config: Mapping[str, Any],
        model: nn.Module,
        probes: Mapping[WatchedLevel, Probe],
        at_start: Mapping[WatchedLevel, Measured],
    ) -> str | None:
        """The part of the problem that is another one at a config, while the losses get the same hyperparameters."""
        try:
            start = model_of_a_training(self.problem, config)
            for level, was in at_start.items():
                raw = next(iter(make_batches(self.problem, level, None, config)))  # type: ignore[arg-type]
                if difference(probes[level].draw(start, raw, 0), was):
                    return "model(hyperparameters) or batches"
        except (NotFiniteError, ProblemError):  # it does not fit what the losses get
            return "model(hyperparameters) or batches"
        here, there = (
            [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
            for optimizer in (optimizer_of_a_training(self.problem, model, c) for c in (self.configs[0], config))
        )
        return None if repr(here) == repr(there) else "optimizer(model, hyperparameters)"

    def without_effect(self, model: nn.Module, names: Sequence[str]) -> list[str]:
        """Of these hyperparameters, those that do not change the gradient of f in the weights, on all data at all
        points, as in `loss + 0 * x`. The weights are moved, as a penalty on weights that start at zero has none there.

        model: its weights are changed.
        """
        with torch.no_grad():
            for weight in model.parameters():
                if weight.requires_grad:
                    weight.add_(0.01 * torch.randn_like(weight))
        left = list(names)
        for point in range(len(self.configs)):
            probe = self.probe("lower", point)
            batches = make_batches(self.problem, "lower", None, self.first) if left else ()
            for raw in batches:
                try:
                    felt = probe.felt(model, raw)
                except (NotFiniteError, ProblemError):  # at this point; who can tell
                    return []
                left = [name for name in left if name not in felt]
                if not left:
                    return []
        # A detached backward pass hides second derivatives. Differences show them.
        return [name for name in left if self.same_gradients(model, name)]

    def same_gradients(self, model: nn.Module, name: str) -> bool:
        """Whether the gradients of f in the weights are the same at two values of a hyperparameter."""
        probe = self.probe("lower")
        path = next(p.path for p in self.space.parameters if p.name == name and p.path in self.entries(0))
        entries = self.entries(0)
        moved = replace(probe, given=self.given({**entries, path: self.entries(1)[path]}), searched={})
        batches = make_batches(self.problem, "lower", None, self.first)
        return all(agree(probe.draw(model, raw, 0).in_y, moved.draw(model, raw, 0).in_y) for raw in batches)


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
    for level, _, share in contradictions(problem, model, functions.variables, constants, x):
        logger.warning(
            "%s.%s_loss changes with the weights %s, over several magnitudes of length; a descent follows "
            "hypergradients of that gradient all the same; is a value rounded, its gradient passed straight through, "
            "or a part detached?", name, level, promised(share),
        )  # fmt: skip
