"""Bounds on metrics that trials report, such as a latency of at most 5 ms."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from raybilevel.errors import ConfigError

WRITTEN = re.compile(r"\s*(<=|>=)\s*(\S+)\s*")


@dataclass(frozen=True)
class MetricBound:
    """A metric, at most or at least a number."""

    metric: str
    relation: Literal["<=", ">="]
    bound: float

    def excess(self, value: float) -> float:
        """How far a value is beyond the bound, in units of |bound|, or of the metric if that is 0; at most 0 where the
        bound is kept."""
        beyond = value - self.bound if self.relation == "<=" else self.bound - value
        return beyond / (abs(self.bound) or 1.0)

    @property
    def written(self) -> str:
        """As the user writes it."""
        return f"{self.relation} {self.bound:.12g}"


Bounds = tuple[MetricBound, ...]


def read_bounds(constraints: Mapping[str, str] | None) -> Bounds:
    """Bounds by the names of their metrics, such as {"latency_ms": "<= 5"}, in the order of the names.

    Raises:
        ConfigError: they are no such mapping.
    """
    if constraints is None:
        return ()
    if not isinstance(constraints, Mapping):
        raise ConfigError(f"constraints: expected a mapping such as {{'latency_ms': '<= 5'}}, got {constraints!r}")
    return tuple(read_bound(*entry) for entry in sorted(constraints.items()))


def read_bound(metric: str, text: str) -> MetricBound:
    found = WRITTEN.fullmatch(text) if isinstance(text, str) else None
    try:
        bound = float(found[2]) if found is not None else math.nan
    except ValueError:
        bound = math.nan
    if found is None or not math.isfinite(bound):
        raise ConfigError(f"constraints: {metric}: expected '<= NUMBER' or '>= NUMBER', got {text!r}")
    relation: Literal["<=", ">="] = "<=" if found[1] == "<=" else ">="
    return MetricBound(metric, relation, bound)


def as_written(bounds: Bounds) -> dict[str, str]:
    """As the user writes them: the inverse of `read_bounds`."""
    return {bound.metric: bound.written for bound in bounds}
