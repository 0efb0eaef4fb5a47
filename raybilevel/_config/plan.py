"""The plan of a run: everything that its config describes, made and checked once, before Ray is started."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from raybilevel._config.experiment import ExperimentConfig
from raybilevel._config.resources import TrainingResources
from raybilevel._metric_bounds import read_bounds
from raybilevel._objectives import read_others
from raybilevel.errors import ConfigError, ProblemError, RaybilevelError, SpaceError
from raybilevel.methods import make_method
from raybilevel.methods._base import Method, check_constraints, check_others, check_priors
from raybilevel.methods._registry import name_for
from raybilevel.problem import BilevelProblem, LargeUpperLevel
from raybilevel.problems import make_problem
from raybilevel.search._checks import check_search
from raybilevel.space import STARTS, Space, check_points, with_priors

Made = TypeVar("Made")


@dataclass(frozen=True)
class Plan:
    """What a run does, and how.

    config:    the config, with the method's name in place of "auto".
    space:     the box to search, or `STARTS`.
    constants: the rest of a trial's config, nested.
    points:    configurations to train first.
    constraints: bounds on metrics, by their names.
    other_objectives: modes of metrics, by their names.
    training, step: resources of a lower-level training and of an upper-level step, by Ray's names.
    seed:      of the search, and of every training's initial weights and order of batches.
    trainings: the number of lower-level trainings, or of descents.
    max_concurrent: how many of them run at once; None for as many as fit.
    epoch_time_limit, step_time_limit: timeouts in seconds; None for none.
    max_failures: retries of a training that fails; -1 for any number.
    """

    config: ExperimentConfig
    problem: BilevelProblem
    method: Method
    space: Space
    constants: Mapping[str, Any]
    points: tuple[Mapping[str, Any], ...]
    constraints: Mapping[str, str]
    other_objectives: Mapping[str, str]
    training: TrainingResources
    step: Mapping[str, float]
    seed: int
    trainings: int
    max_concurrent: int | None
    epoch_time_limit: float | None
    step_time_limit: float | None
    max_failures: int

    @property
    def upper_level(self) -> str:
        """A description of the upper level."""
        if isinstance(self.problem, LargeUpperLevel) and self.space.of_starts:
            count = sum(parameter.numel() for parameter in self.problem.upper_variables().parameters())
            return f"{count:,} upper-level variables"
        return f"{self.space.dimension} hyperparameters"


@dataclass(frozen=True)
class Machine:
    """The resources of a machine. Ray may be told to use less.

    memory: bytes.
    """

    cpus: float
    gpus: float
    memory: float


def this_machine() -> Machine:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Machine(float(os.cpu_count() or 1), float(torch.cuda.device_count()), float(memory))


def resolve(config: ExperimentConfig, data: str | None = None, machine: Machine | None = None) -> Plan:
    """The plan of a run. Everything is checked that can be checked without Ray.

    data:    the folder of the problem's data files.
    machine: the machine of a local run; None for a cluster, whose resources are not known yet.

    Raises:
        RaybilevelError: there is a mistake. Several mistakes are one ConfigError with a line for each.
    """
    # First, since which method "auto" is decides what is checked below.
    config = with_method(config)
    search, mistakes = config.search, Mistakes()
    problem = mistakes.made_by(lambda: make_problem(config.problem, config.options, data))
    method = mistakes.made_by(lambda: make_method(search.method, **search.settings))
    if machine is not None:
        mistakes.made_by(lambda: check_machine(config, machine))
    # The later checks need a problem, a method and a space, so without one of them it ends here.
    if problem is None or method is None:
        raise mistakes.as_one()
    space = mistakes.made_by(lambda: space_of(config, method))
    if space is None:
        raise mistakes.as_one()
    mistakes.made_by(lambda: check_points(search.points_to_evaluate, space, "search.points_to_evaluate"))
    mistakes.made_by(lambda: check_constraints(method, read_bounds(search.constraints)))
    mistakes.made_by(lambda: check_others(method, read_others(search.other_objectives)))
    mistakes.made_by(lambda: check_priors(method, with_priors(space, search.priors)))
    checked = mistakes.made_by(lambda: check_levels(problem, space, config.constants, method))
    if checked is None or mistakes.found:
        raise mistakes.as_one()
    return Plan(
        config=config,
        problem=problem,
        method=method,
        space=checked,
        constants=config.constants,
        points=tuple(search.points_to_evaluate),
        constraints=search.constraints,
        other_objectives=search.other_objectives,
        training=config.resources.of_training(config.on_gpu),
        step=config.resources.of_step(config.on_gpu),
        seed=search.seed,
        trainings=search.trainings,
        max_concurrent=search.max_concurrent,
        epoch_time_limit=search.epoch_time_limit,
        step_time_limit=search.step_time_limit,
        max_failures=search.max_failures,
    )


def with_method(config: ExperimentConfig) -> ExperimentConfig:
    """The config with a method. The dimension decides if it is "auto"."""
    if config.search.method != "auto":
        return config
    search = config.search.model_copy(update={"method": name_for(len(config.parameters))})
    return config.model_copy(update={"search": search})


class Mistakes:
    """Collects mistakes, so that one error reports all of them."""

    def __init__(self) -> None:
        self.found: list[RaybilevelError] = []

    def made_by(self, make: Callable[[], Made]) -> Made | None:
        """The result of a function. If it raises an error, keep the error and return None."""
        try:
            return make()
        except RaybilevelError as error:
            self.found.append(error)
            return None

    def as_one(self) -> RaybilevelError:
        """The only mistake itself, or several as one error with a line for each."""
        if len(self.found) == 1:
            return self.found[0]
        return ConfigError("\n".join(map(str, self.found)))


def space_of(config: ExperimentConfig, method: Method) -> Space:
    """The space to search: the box of the config, or without one the starts of descents.

    Raises:
        SpaceError: the method needs a box and there is none, or a hyperparameter is given twice.
    """
    if config.box is not None:
        return config.box
    if method.descent is not None:
        return STARTS
    raise SpaceError(
        f"space: method {config.search.method!r} needs a hyperparameter to search; give at least one, e.g. decay: "
        "{loguniform: [1e-6, 1.0]}"
    )


def check_levels(problem: BilevelProblem, space: Space, constants: Mapping[str, Any], method: Method) -> Space:
    """Try both levels before anything is trained; the space, as `check_search` returns it.

    Raises:
        ProblemError, NotFiniteError: the problem breaks its contract, or cannot be evaluated in this space at all.
        ConfigError: the method cannot search it.
    """
    try:
        return check_search(problem, space, constants, method)
    except RaybilevelError:
        raise
    # Of a large upper level, whose losses are called as they are: `check_problem` puts this into words itself.
    except KeyError as error:
        raise ProblemError(
            f"space: {type(problem).__name__} reads the hyperparameter {error}, which is not there; give it a "
            "domain or a constant"
        ) from error
    except Exception as error:  # whatever a problem's own code raises
        raise ProblemError(
            f"{type(problem).__name__} cannot be evaluated at the centre of the space: {type(error).__name__}: {error}"
        ) from error


def check_machine(config: ExperimentConfig, machine: Machine) -> None:
    """Check that a training, and an upper-level step, fit on a machine at all.

    Raises:
        ConfigError: one does not fit. There is a line for each resource that is too large.
    """
    if config.on_gpu and not machine.gpus:
        raise ConfigError(
            f"options.device: {config.options['device']!r}, and this machine has no GPU; join a cluster that has by "
            "--address"
        )
    # Ray itself says nothing: what no node has is waited for without end.
    has = {"CPU": machine.cpus, "GPU": machine.gpus, "memory": machine.memory}
    training, step = config.resources.of_training(config.on_gpu).bundles, config.resources.of_step(config.on_gpu)
    mistakes = []
    for key, what, bundles in (("lower", "a training", training), ("upper", "an upper-level step", (step,))):
        for name, there in has.items():
            # Ray reserves all processes of a training at once.
            asked = sum(bundle.get(name, 0.0) for bundle in bundles)
            if asked > there:
                mistakes.append(
                    f"resources.{key}: {what} asks for {name}: {asked:g}, this machine has {there:g}; ask for less, or "
                    "join a cluster by --address"
                )
    if mistakes:
        raise ConfigError("\n".join(mistakes))
