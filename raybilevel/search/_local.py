"""A whole search in this process, one training after another: for small problems, tests and benchmarks. No Ray."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from raybilevel._lower.training import TrainedLowerLevel, load_checkpoint, train
from raybilevel._metric_bounds import Bounds, read_bounds
from raybilevel._objectives import Others, read_others
from raybilevel.errors import ConfigError, NotFiniteError, ProblemError
from raybilevel.methods._base import check_constraints, check_others, check_priors
from raybilevel.problem import BilevelProblem
from raybilevel.search._checks import check_search
from raybilevel.search._optimizer import BilevelOptimizer, Observation
from raybilevel.space import Space, flatten, nest

logger = logging.getLogger(__name__)


def observe(
    space: Space,
    config: Mapping[str, Any],
    trained: TrainedLowerLevel,
    at: Sequence[float] | None = None,
    bounds: Bounds = (),
    others: Others = (),
) -> Observation:
    """A training's result in the terms of the search: gradients in the unit cube.

    at: the point of the config, shape (d,), where it is known; see `Space.to_unit_gradient`.

    Raises:
        ProblemError: a metric that has a bound, or is an objective, is not among those of `evaluate`.
    """
    for what, wanted in (("constraints", bounds), ("other_objectives", others)):
        if lacking := [one.metric for one in wanted if one.metric not in trained.metrics]:
            raise ProblemError(f"{what}: evaluate does not return {', '.join(lacking)}; return it with the others")
    excesses = tuple(bound.excess(trained.metrics[bound.metric]) for bound in bounds)
    minimised = tuple(other.minimised(trained.metrics[other.metric]) for other in others)
    gradient = {"/".join(path): value for path, value in flatten(trained.lower_gradient).items()}
    point = None if at is None else torch.tensor(at, dtype=torch.double)
    unit = space.to_unit_gradient(config, gradient, point)
    return Observation(
        trained.upper_loss, trained.lower_loss, tuple(unit.tolist()), trained.passes,
        excesses=excesses, others=minimised,
    )  # fmt: skip


def search(
    problem: BilevelProblem,
    optimizer: BilevelOptimizer,
    cost: float,
    constants: Mapping[str, Any] | None = None,
    constraints: Mapping[str, str] | None = None,
    other_objectives: Mapping[str, str] | None = None,
) -> dict[int, bytes]:
    """Train until the cost (in trainings, upper-level steps included) is spent; the checkpoints by training.

    constraints: bounds on what the problem's `evaluate` returns, such as {"latency_ms": "<= 5"}.
    other_objectives: what it returns that is to be weighed against F, with its mode, such as {"latency_ms": "min"}.

    Raises:
        ConfigError: the method's trials are descents, or it takes no constraints, other objectives or priors.
        ProblemError, NotFiniteError: before anything is trained; see `check_problem`. After the first training, where a
            metric that has a bound, or is an objective, is not returned.
    """
    constants, bounds, others = constants or {}, read_bounds(constraints), read_others(other_objectives)
    check_constraints(optimizer.method, bounds)
    check_others(optimizer.method, others)
    check_priors(optimizer.method, optimizer.space)
    space = optimizer.space = check_search(problem, optimizer.space, constants, optimizer.method)
    if optimizer.method.descent is not None:
        raise ConfigError(f"the trials of {type(optimizer.method).__name__} are descents, which are not run here")
    checkpoints: dict[int, bytes] = {}
    while optimizer.state.cost < cost and not optimizer.exhausted:
        # All steps that can be planned, before the next training: they may propose it.
        while (step := optimizer.plan()) is not None:
            result = None
            try:
                result = optimizer.run(problem, constants, step, lambda index: load_checkpoint(checkpoints[index]))
            except NotFiniteError as error:
                logger.error(
                    "upper-level step %d failed; a space-filling point takes its place: %s", step.number, error
                )
            optimizer.tell_step(step.number, result)
        trial = str(len(optimizer.state.trainings))
        asked = optimizer.ask(trial)
        if asked is None:
            break
        config = nest({**flatten(constants), **flatten(asked)})
        try:
            trained, checkpoints[optimizer.trials[trial]] = train(problem, config, optimizer.seed)
        except NotFiniteError:
            optimizer.tell(trial, None)
        else:
            unit = optimizer.state.trainings[optimizer.trials[trial]].unit
            optimizer.tell(trial, observe(space, config, trained, unit, bounds, others))
    return checkpoints
