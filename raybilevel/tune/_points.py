"""Configurations as users and Tune hand them over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raybilevel.space import flatten, nest


def reported_config(result: Mapping[str, Any] | None) -> dict[str, Any]:
    """The config that Tune adds to every result, whether it is nested or flat."""
    config = unflatten(result or {}).get("config", {})
    return config if isinstance(config, dict) else {}


def unflatten(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Tune hands evaluated points over flat ("a/b") or nested; nested is what the space reads."""
    return nest({tuple(key for part in path for key in part.split("/")): v for path, v in flatten(parameters).items()})
