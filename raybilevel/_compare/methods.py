"""The methods of a comparison by name: searchers and schedulers of Ray Tune, and raybilevel's own methods."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from raybilevel._records.names import OWN_METHODS
from raybilevel._tree import Path
from raybilevel.errors import ConfigError
from raybilevel.methods import make_method
from raybilevel.problem import BilevelProblem
from raybilevel.space import Parameter, Space

METRIC, TIME = "upper_loss", "epoch"
LARGEST_GRID = 4096

SEARCHERS = ("random", "grid", *OWN_METHODS, "optuna", "optuna-gp", "hyperopt", "ax", "bayesopt", "bohb")
STOPPERS = ("asha", "hyperband", "median-stopping")
"""Schedulers that stop trainings early and work with any searcher."""
PAUSERS = ("hyperband", "median-stopping", "pbt", "pb2", "bohb")
"""Schedulers that pause trials and resume them from checkpoints. Trials write one after every epoch for them."""

WITHOUT_LOGARITHMS = ("bayesopt",)
"""Searchers that ignore logarithmic scales. They search the unit cube, in which the scale is the same as for others."""

COMBINED = {
    **{name: (name, None) for name in SEARCHERS if name != "bohb"},
    **{name: ("random", name) for name in (*STOPPERS, "pbt", "pb2")},
    "bohb": ("bohb", "bohb"),
}
"""Method -> its searcher and its scheduler."""


@dataclass(frozen=True)
class Parts:
    """A method as a searcher and perhaps a scheduler."""

    searcher: str
    scheduler: str | None = None

    @property
    def own(self) -> bool:
        return self.searcher in OWN_METHODS

    @property
    def stops_early(self) -> bool:
        return self.scheduler is not None


@dataclass(frozen=True)
class Setting:
    """The task that a method is set up for.

    param_space: in Tune's domains.
    epochs:      of a complete training.
    trainings:   the budget in trainings; None if it is in seconds.
    slots:       concurrent trials.
    """

    problem: BilevelProblem
    space: Space
    param_space: Mapping[str, Any]
    epochs: int
    seed: int
    trainings: float | None
    slots: int
    upper_resources: Mapping[str, Any] | None = None
    searcher: Mapping[str, Any] = field(default_factory=dict)
    scheduler: Mapping[str, Any] = field(default_factory=dict)


class UnavailableError(ConfigError):
    """A method cannot be run here: a package is missing, or broken with the installed Ray."""


def parse(name: str) -> Parts:
    """The parts of a method from its name. "optuna+asha" is a searcher with a scheduler.

    Raises:
        ConfigError: there is no such method.
    """
    if name in COMBINED:
        return Parts(*COMBINED[name])
    searcher, plus, scheduler = name.partition("+")
    if plus and searcher in SEARCHERS and searcher != "bohb" and scheduler in STOPPERS:
        return Parts(searcher, scheduler)
    raise ConfigError(
        f"unknown method {name!r}; choose one of {', '.join(COMBINED)}, or a searcher with one of "
        f"{', '.join(STOPPERS)}, e.g. optuna+asha"
    )


def check_settings(parts: Parts, searcher: Mapping[str, Any], scheduler: Mapping[str, Any]) -> None:
    """Check a method's settings, as far as that is possible before it is set up.

    Raises:
        ConfigError: the method has no such setting.
    """
    if parts.own:
        make_method(OWN_METHODS[parts.searcher], **searcher)
    elif searcher and parts.searcher in ("random", "grid"):
        raise ConfigError(f"the searcher {parts.searcher!r} has no settings")
    if scheduler and parts.scheduler is None:
        raise ConfigError("settings of a scheduler, but the method has none")


def check_space(parts: Parts, space: Space) -> None:
    """Check that a method of others can search a space.

    Raises:
        UnavailableError: it cannot.
    """
    population = parts.scheduler in ("pbt", "pb2")
    if (parts.own or parts.searcher == "random") and not population:
        return
    name = parts.scheduler if population else parts.searcher
    if space.conditional or any(isinstance(key, int) for p in space.parameters for key in p.path):
        raise UnavailableError(f"{name} cannot search lists and alternatives")
    if name == "pb2" and any(p.levels for p in space.parameters):
        raise UnavailableError("pb2 searches ranges of numbers, and no choices or few whole numbers")


def make_searcher(name: str, setting: Setting) -> Any:
    """A new Tune searcher; None if Tune's own variant generator takes its place.

    Raises:
        UnavailableError: its package is missing.
        ConfigError: it has no such setting.
    """
    makers: dict[str, Callable[..., Any]] = {
        "optuna": _optuna, "optuna-gp": _optuna_gp, "hyperopt": _hyperopt, "ax": _ax, "bayesopt": _bayesopt,
        "bohb": _bohb,
    }  # fmt: skip
    if name in ("random", "grid"):
        return None
    try:
        return makers[name](setting, **setting.searcher)
    except (ImportError, AssertionError) as error:
        # Ray's searchers assert that their package is installed, in a message of several lines.
        raise UnavailableError(" ".join(str(error).split()) or type(error).__name__) from error
    except TypeError as error:
        raise ConfigError(f"searcher {name!r}: {error}") from error


def probe(name: str, setting: Setting) -> None:
    """Check by two suggestions and their results that a third-party searcher works with the installed Ray at all.

    Raises:
        UnavailableError: it does not work. The message has the reason.
    """
    searcher = make_searcher(name, setting)
    if searcher is None:
        return
    # BOHB's searcher reads the last entry.
    result = {METRIC: 1.0, TIME: 1, "training_iteration": 1, "hyperband_info": {"budget": 1}}
    try:
        searcher.set_search_properties(METRIC, "min", dict(setting.param_space))
        for trial in ("probe-1", "probe-2"):
            if not isinstance(searcher.suggest(trial), dict):
                raise UnavailableError("it suggests nothing")
            searcher.on_trial_result(trial, result)
            searcher.on_trial_complete(trial, result=result)
    except UnavailableError:
        raise
    except Exception as error:  # a package of another version may raise anything
        raise UnavailableError(f"{type(error).__name__}: {' '.join(str(error).split())}") from error


def make_scheduler(name: str | None, setting: Setting) -> Any:
    """A new Tune scheduler; None if every training is to be completed.

    Raises:
        ConfigError: it has no such setting.
    """
    from ray.tune import schedulers

    if name is None:
        return None
    # By default ASHA ends every training at 100 of its units.
    halving = {"max_t": setting.epochs, "time_attr": TIME}
    # The rungs may end before a complete training. Trials that survive all of them are to be completed.
    bands = {**halving, "stop_last_trials": False}
    interval = {"perturbation_interval": max(1, setting.epochs // 5), "time_attr": TIME}
    makers: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
        "asha": lambda: (schedulers.ASHAScheduler, {**halving, "grace_period": max(1, setting.epochs // 16)}),
        "hyperband": lambda: (schedulers.HyperBandScheduler, bands),
        "median-stopping": lambda: (
            schedulers.MedianStoppingRule, {"time_attr": TIME, "grace_period": max(1, setting.epochs // 16)},
        ),
        "bohb": lambda: (schedulers.HyperBandForBOHB, bands),
        "pbt": lambda: (
            # log_config would write a file of the changes of each member on the driver's machine.
            schedulers.PopulationBasedTraining,
            {**interval, "hyperparam_mutations": dict(setting.param_space), "log_config": False},
        ),
        "pb2": lambda: (_pb2(), {**interval, "hyperparam_bounds": bounds(setting.space), "log_config": False}),
    }  # fmt: skip
    kind, given = makers[name]()
    try:
        return kind(**{**given, **setting.scheduler})
    except (TypeError, AssertionError) as error:
        raise ConfigError(f"scheduler {name!r}: {error}") from error


def _pb2() -> Any:
    from ray.tune.schedulers.pb2 import PB2

    return PB2


def bounds(space: Space) -> dict[str, Any]:
    from raybilevel.space import nest

    return nest({p.path: [p.low, p.high] for p in space.parameters})


def grid(space: Space, trainings: float | None) -> dict[Path, list[Any]]:
    """Values of each hyperparameter by path, bounds included. The full grid is about as large as the budget. Of choices
    and whole numbers there are as many values, or all where these are fewer.

    Raises:
        UnavailableError: a grid of two values each is already far too large.
    """
    if 2**space.dimension > LARGEST_GRID:
        raise UnavailableError(f"two values for each of {space.dimension} hyperparameters make {2**space.dimension:,}")
    wanted = 100 if trainings is None else trainings
    # The largest grid within the budget. 1e-9, since 1000 ** (1 / 3) is 9.999999999999998.
    side = max(2, math.floor(wanted ** (1 / space.dimension) + 1e-9))
    return {p.path: values_along(p, [i / (side - 1) for i in range(side)]) for p in space.parameters}


def values_along(parameter: Parameter, places: Sequence[float]) -> list[Any]:
    """Values of a hyperparameter at these shares of the way from its lower bound to its upper one, each once."""
    p, levels = parameter, parameter.levels
    if levels:
        numbers = dict.fromkeys(round(place * (len(levels) - 1)) for place in places)
        return [p.to_value(levels[number]) for number in numbers]
    values = [p.round(p.low * (p.high / p.low) ** u if p.log else p.low + u * (p.high - p.low)) for u in places]
    return list(dict.fromkeys(map(int, values) if p.integer else values))


def _optuna(setting: Setting, **given: Any) -> Any:
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return OptunaSearch(sampler=optuna.samplers.TPESampler(seed=setting.seed, **given))


def _optuna_gp(setting: Setting, **given: Any) -> Any:
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return OptunaSearch(sampler=optuna.samplers.GPSampler(seed=setting.seed, **given))


def _hyperopt(setting: Setting, **given: Any) -> Any:
    from ray.tune.search.hyperopt import HyperOptSearch

    return HyperOptSearch(random_state_seed=setting.seed, **given)


def _ax(setting: Setting, **given: Any) -> Any:
    from ray.tune.search.ax import AxSearch

    return AxSearch(random_seed=setting.seed, **given)


def _bayesopt(setting: Setting, **given: Any) -> Any:
    from ray.tune.search.bayesopt import BayesOptSearch

    return BayesOptSearch(random_state=setting.seed, **given)


def _bohb(setting: Setting, **given: Any) -> Any:
    from ray.tune.search.bohb import TuneBOHB

    return TuneBOHB(seed=setting.seed, **given)
