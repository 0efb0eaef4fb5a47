"""The methods by name."""

from __future__ import annotations

from typing import Any

from raybilevel.errors import ConfigError
from raybilevel.methods._base import Method
from raybilevel.methods._default import Default
from raybilevel.methods._hypergradient import HypergradientDescent
from raybilevel.methods._paper import Paper

METHODS: dict[str, type[Method]] = {
    "default": Default,
    "hypergradient": HypergradientDescent,
    "paper": Paper,
}


def make_method(name: str, **settings: Any) -> Method:
    """A method with settings other than its defaults.

    Raises:
        ConfigError: there is no such method, or it has no such setting.
    """
    if name not in METHODS:
        raise ConfigError(f"unknown method {name!r}; choose one of {', '.join(sorted(METHODS))}")
    known = METHODS[name].__dataclass_fields__
    for setting in settings:
        if setting not in known:
            raise ConfigError(f"method {name!r} has no setting {setting!r}; it has {', '.join(known)}")
    return METHODS[name](**settings)


def name_of(method: Method) -> str:
    """A method's name in saved states: the one in `METHODS`, else the qualified name of its class."""
    kind = type(method)
    return next((name for name, known in METHODS.items() if known is kind), f"{kind.__module__}.{kind.__qualname__}")


def name_for(hyperparameters: int) -> str:
    """The method for so many hyperparameters, where none is named; 0 where the upper level is a module."""
    most = Default.most_hyperparameters
    return "hypergradient" if hyperparameters == 0 or (most is not None and hyperparameters > most) else "default"
