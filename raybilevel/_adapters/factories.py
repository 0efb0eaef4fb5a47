"""What a user gives to make something of a trial's config: a class, a function, or the settings of one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from raybilevel.errors import ConfigError

Factory = Callable[..., Any]
"""Called with the config, or with those of its entries that it has parameters for."""


def made_of(factory: Factory, config: Mapping[str, Any], what: str) -> Any:
    """What a factory makes of a config.

    A parameter that has the name of an entry gets it. A factory whose only other parameter without a default has no
    such name gets the config in it.

    what: the argument that it was given as.

    Raises:
        ConfigError: it has several parameters that the config has no entries for.
    """
    parameters = inspect.signature(factory).parameters.values()
    gathers = {p.kind for p in parameters} & {inspect.Parameter.VAR_KEYWORD}
    single = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    missing = [p.name for p in single if p.default is p.empty and p.name not in config]
    named = {p.name: config[p.name] for p in single if p.name in config}
    if len(missing) == 1 and not named:
        return factory(config)
    if missing:
        raise ConfigError(
            f"{what}: {getattr(factory, '__name__', factory)!s} has the parameters {', '.join(missing)} without a "
            "default, and the config has no such entries; give a function of the config"
        )
    return factory(**(config if gathers and not named else named))


def check_factory(factory: object, what: str) -> None:
    """Whether something is a class or a function.

    Raises:
        ConfigError: it is not.
    """
    if not callable(factory):
        raise ConfigError(f"{what} must be a class or a function of the config, got {type(factory).__name__}")
