"""The methods by name."""

from __future__ import annotations

from typing import Any

from raybilevel.errors import ConfigError
from raybilevel.methods._base import Method
from raybilevel.methods._default import Default
from raybilevel.methods._hypergradient import HypergradientDescent
from raybilevel.methods._paper import Paper

__all__ = ["METHODS", "Default", "HypergradientDescent", "Method", "Paper", "make_method"]

METHODS: dict[str, type[Default] | type[HypergradientDescent] | type[Paper]] = {
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
