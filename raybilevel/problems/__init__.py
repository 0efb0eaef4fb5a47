"""The problems that ship, by name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from raybilevel._own_problem import is_own, problem_class
from raybilevel.errors import ConfigError, ProblemError, RaybilevelError
from raybilevel.problem import BilevelProblem
from raybilevel.problems.architecture import Architecture
from raybilevel.problems.banded_ridge import BandedRidge
from raybilevel.problems.cifar import CifarLenet
from raybilevel.problems.cleaning import DigitsCleaning, HyperCleaning
from raybilevel.problems.digits import DigitsLogistic, DigitsPerceptron
from raybilevel.problems.equilibrium import EquilibriumDigits
from raybilevel.problems.example_weights import ExampleWeights
from raybilevel.problems.few_shot import FewShot
from raybilevel.problems.graph import GraphStructure
from raybilevel.problems.imaging import FieldsOfExperts, RegularisationParameters
from raybilevel.problems.income import Income
from raybilevel.problems.long_tail import LongTailed
from raybilevel.problems.mnist import Mnist, Mnist1K
from raybilevel.problems.mnist_kinds import Mnist1KKinds
from raybilevel.problems.physics import PhysicsInformed
from raybilevel.problems.ridge import Ridge
from raybilevel.problems.synthetic import ManyMinimisers, SeveralOptima
from raybilevel.problems.treatment import TreatmentEffects
from raybilevel.problems.weighting import NoisyLabels

__all__ = [
    "PROBLEMS",
    "Architecture",
    "CifarLenet",
    "DigitsCleaning",
    "DigitsLogistic",
    "DigitsPerceptron",
    "EquilibriumDigits",
    "ExampleWeights",
    "FewShot",
    "FieldsOfExperts",
    "GraphStructure",
    "HyperCleaning",
    "Income",
    "LongTailed",
    "ManyMinimisers",
    "Mnist",
    "Mnist1K",
    "Mnist1KKinds",
    "NoisyLabels",
    "PhysicsInformed",
    "RegularisationParameters",
    "Ridge",
    "SeveralOptima",
    "TreatmentEffects",
    "make_problem",
    "option_names",
]

PROBLEMS: dict[str, type[BilevelProblem]] = {
    "architecture": Architecture,
    "banded_ridge": BandedRidge,
    "cifar_lenet": CifarLenet,
    "cleaning": HyperCleaning,
    "digits": DigitsPerceptron,
    "digits_cleaning": DigitsCleaning,
    "digits_logistic": DigitsLogistic,
    "equilibrium": EquilibriumDigits,
    "example_weights": ExampleWeights,
    "few_shot": FewShot,
    "fields_of_experts": FieldsOfExperts,
    "graph_structure": GraphStructure,
    "income": Income,
    "long_tail": LongTailed,
    "many_minimisers": ManyMinimisers,
    "mnist": Mnist,
    "mnist_1k": Mnist1K,
    "mnist_1k_kinds": Mnist1KKinds,
    "noisy_labels": NoisyLabels,
    "physics_informed": PhysicsInformed,
    "regularisation_parameters": RegularisationParameters,
    "ridge": Ridge,
    "several_optima": SeveralOptima,
    "treatment_effects": TreatmentEffects,
}


def make_problem(name: str, options: Mapping[str, Any] | None = None, data: str | None = None) -> BilevelProblem:
    """Make a problem by its name.

    name:    one of `PROBLEMS`, or where a class of your own is: `package.module:Class` or `folder/file.py:Class`.
    options: of its constructor, and `device`, where trainings run, e.g. "cuda".
    data:    the folder of data files, for problems that read any.

    Raises:
        ConfigError: there is no such problem, or it has no such option.
        ProblemError: the code of a problem of your own fails.
    """
    kind = problem_class(name) if is_own(name) else shipped(name)
    known = option_names(kind)
    given = dict(options or {})
    # An attribute of every problem, so that no constructor has to take it.
    device = given.pop("device", None)
    if data is not None and "data" in known:
        given.setdefault("data", data)
    for option in given:
        if option not in known:
            raise ConfigError(f"problem {name!r} has no option {option!r}; it has {', '.join(known) or 'none'}")
    try:
        problem = kind(**given)
    except RaybilevelError:
        raise
    except TypeError as error:
        raise ConfigError(f"problem {name!r}: {error}") from error
    except Exception as error:
        if not is_own(name):
            raise
        raise ProblemError(f"problem {name!r}: its constructor fails: {type(error).__name__}: {error}") from error
    if device is not None:
        problem.device = device
    return problem


def shipped(name: str) -> type[BilevelProblem]:
    """Raises ConfigError: there is no such problem."""
    if name not in PROBLEMS:
        raise ConfigError(
            f"unknown problem {name!r}; choose one of {', '.join(sorted(PROBLEMS))}, or name one of your own by "
            "package.module:Class or folder/file.py:Class"
        )
    return PROBLEMS[name]


def option_names(problem: type[BilevelProblem]) -> list[str]:
    """The options of a problem's constructor, and those of its base classes if it passes further options on."""
    return list(options_of(problem))


def options_of(problem: type[BilevelProblem]) -> dict[str, Any]:
    """The same with their defaults; `inspect.Parameter.empty` for an option that must be given."""
    found: dict[str, Any] = {}
    for cls in problem.__mro__:
        if "__init__" not in vars(cls):
            continue
        parameters = inspect.signature(vars(cls)["__init__"]).parameters.values()
        named = (p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name != "self")
        found |= {p.name: p.default for p in named if p.name not in found}
        # Without **options nothing reaches the classes above.
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return found
