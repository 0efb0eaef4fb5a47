"""From a Tune `param_space` to what a search needs of it, checked before anything is trained."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raybilevel._cluster.identity import is_other
from raybilevel._define_by_run import SpaceFunction
from raybilevel._metric_bounds import Bounds
from raybilevel._metrics import LOWER_LOSS, PROBLEM, UPPER_LOSS
from raybilevel._objectives import Others
from raybilevel._tree import flatten, nest
from raybilevel.errors import ConfigError
from raybilevel.methods import Method
from raybilevel.methods._base import check_constraints, check_others, check_priors
from raybilevel.problem import BilevelProblem, trains_itself
from raybilevel.search._checks import check_search, metric_names
from raybilevel.search_state import SearchState
from raybilevel.space import Space, check_points, with_priors
from raybilevel.tune._domains import split_param_space
from raybilevel.tune._failures import ALIKE_AT_MOST
from raybilevel.tune._results import Objective

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SetUp:
    """constants: around the space. method: the one that searches the metric."""

    space: Space
    constants: dict[str, Any]
    method: Method


def set_up(
    problem: BilevelProblem,
    param_space: Mapping[str, Any] | SpaceFunction,
    more_constants: Mapping[str, Any],
    objective: Objective,
    method: Method,
    points: Sequence[Mapping[str, Any]],
    samples: int | None = None,
    bounds: Bounds = (),
    others: Others = (),
    priors: Mapping[str, Any] | None = None,
) -> SetUp:
    """Check everything that can be wrong with a search once its space is known.

    more_constants: that are not in `param_space`.
    samples:        trials that there will be, if that is known.
    bounds:         of other metrics.
    others:         objectives beside the first.
    priors:         of the optimum; see `with_priors`.

    Raises:
        ConfigError: the method cannot search this metric, problem or space, or takes no constraints, one metric only or
            no priors.
        SpaceError: the space cannot be searched, or points or priors are not in it.
        ProblemError, NotFiniteError: see `check_search`.
    """
    space, constants = split_param_space(param_space)
    constants = nest({**flatten(constants), **flatten(more_constants)})
    if objective.mode == "max" and is_upper_loss(problem, objective.metric):
        raise ConfigError(
            f"mode='max' with metric={objective.metric!r}: the upper-level loss is minimised; use mode='min'"
        )
    check_constraints(method, bounds)
    check_others(method, others)
    space = with_priors(space, priors or {})
    check_priors(method, space)
    # The space that comes back says in which hyperparameters f is differentiable.
    space = check_search(problem, space, constants, method)
    check_points(points, space)
    if samples is not None and samples % space.cells and samples < sys.maxsize:
        logger.warning(
            "num_samples=%d is shared out among the %d cells of the grid, and some get one trial more. With a searcher "
            "it counts all trials: for n in each cell, give n * %d", samples, space.cells, space.cells,
        )  # fmt: skip
    if not all(space.smooth) and not space.of_starts:
        logger.warning("%s", in_words(space))
    method = method_for(method, problem, objective.metric)
    if not is_upper_loss(problem, objective.metric):
        logger.warning(
            "searching %r by its values alone: hypergradients are those of 'upper_loss', not of this metric",
            objective.metric,
        )
    wanted = {objective.metric, *(bound.metric for bound in bounds), *(other.metric for other in others)}
    warn_of_lacking(problem, space, constants, wanted)
    most = method.most_hyperparameters
    if most is not None and space.dimension > most:
        logger.warning(
            "%d hyperparameters are many for a Gaussian process; method='hypergradient' with "
            "hypergradient_trainable follows gradients without one", space.dimension,
        )  # fmt: skip
    return SetUp(space, constants, method)


def warn_of_lacking(problem: BilevelProblem, space: Space, constants: Mapping[str, Any], wanted: set[str]) -> None:
    """Name the metrics that `evaluate` does not return."""
    wanted = wanted - {UPPER_LOSS, LOWER_LOSS, problem.upper_metric}
    if not wanted or space.of_starts or problem.own_loop or trains_itself(problem):
        return
    if lacking := wanted - metric_names(problem, space, constants):
        logger.warning(
            "%s.evaluate does not return %s, which the search needs of each trial; return it, unless a trainable of "
            "your own reports it", type(problem).__name__, ", ".join(sorted(lacking)),
        )  # fmt: skip


def is_upper_loss(problem: BilevelProblem, metric: str) -> bool:
    """Whether a metric is F, by its own name or by that of the problem."""
    return metric in (UPPER_LOSS, problem.upper_metric)


def method_for(method: Method, problem: BilevelProblem, metric: str) -> Method:
    """The method as it searches a metric.

    Raises:
        ConfigError: it searches F only.
    """
    return method if is_upper_loss(problem, metric) else method.for_metric(metric)


def in_words(space: Space) -> str:
    """Which hyperparameters are searched with gradients, and which by values."""
    names: dict[bool, list[str]] = {True: [], False: []}
    for parameter, smooth in zip(space.parameters, space.smooth, strict=True):
        if parameter.name not in names[smooth]:
            names[smooth].append(parameter.name)
    return f"with gradients: {', '.join(names[True]) or 'none'}; by values: {', '.join(names[False])}"


def other_objective(asked: Objective, here: Objective) -> str:
    """What to say where Tune and a search disagree on metric and mode."""
    return (
        f"Tune is given metric={asked.metric!r}, mode={asked.mode!r}, and this search has {here.metric!r}, "
        f"{here.mode!r}; give both the same, and a search of its own to each metric"
    )


def warn_of_stops(state: SearchState, problem: BilevelProblem, method: Method) -> bool:
    """Whether trainings end before their last epoch, and none runs to it; that is said then."""
    instead = "goes by the values of F where they stopped" if method.enough_stopped else "only fills the space"
    stopped = len(state.measured) - len(state.done)
    if state.done or stopped < ALIKE_AT_MOST:
        return False
    if problem.own_loop:
        logger.warning(
            "%d trainings ended without raybilevel.conclude(problem, model, config), and none with it: without trained "
            "weights there is no hypergradient, and the search %s. Make it the last call of the Tune function",
            stopped, instead,
        )  # fmt: skip
        return True
    logger.warning(
        "%d trainings were stopped before their last epoch (%s.epochs = %d), and none ran to it: without trained "
        "weights there is no hypergradient, and the search %s. Let trainings end (a scheduler's max_t and stop's "
        "training_iteration of at least %d), or lower epochs",
        stopped, type(problem).__name__, problem.epochs, instead, problem.epochs,
    )  # fmt: skip
    return True


def warn_of_another_problem(problem: BilevelProblem, identity: str, result: Mapping[str, Any]) -> bool:
    """Whether a result is of another problem than the search's; that is said then."""
    trained = result.get(PROBLEM)
    if trained is None or not is_other(identity, trained):
        return False
    logger.warning(
        "the %s of the trainable and that of the search differ in their class or attributes, so that hypergradients "
        "are not those of what is trained; make one problem, and give it to both", type(problem).__name__,
    )  # fmt: skip
    return True
