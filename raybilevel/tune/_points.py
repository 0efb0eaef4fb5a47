"""Configurations as users and Tune hand them over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from raybilevel.errors import SpaceError
from raybilevel.space import Space, flatten, nest


def check_points(points: Sequence[Mapping[str, Any]], space: Space, name: str = "points_to_evaluate") -> None:
    """Whether points name every hyperparameter of the space, nested as it is, within its bounds.

    Raises:
        SpaceError: naming the point and what is wrong with it.
    """
    for number, point in enumerate(points):
        names = {"/".join(path) for path in flatten(point)}
        unknown = names - set(space.names)
        if unknown:
            raise SpaceError(
                f"{name}[{number}]: {', '.join(sorted(unknown))} not in the space, which has {', '.join(space.names)}"
            )
        for parameter in space.parameters:
            value = space.value(point, parameter)
            if not parameter.low <= value <= parameter.high:
                raise SpaceError(
                    f"{name}[{number}]: {parameter.name} = {value} is outside [{parameter.low}, {parameter.high}]"
                )


def reported_config(result: Mapping[str, Any] | None) -> dict[str, Any]:
    """The config that Tune adds to every result, whether it is nested or flat."""
    config = unflatten(result or {}).get("config", {})
    return config if isinstance(config, dict) else {}


def unflatten(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Tune hands evaluated points over flat ("a/b") or nested; nested is what the space reads."""
    return nest({tuple(key for part in path for key in part.split("/")): v for path, v in flatten(parameters).items()})
