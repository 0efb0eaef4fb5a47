"""Several metrics at once: the first is what a search minimises or maximises, and others are weighed against it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

from raybilevel.errors import ConfigError

Mode = Literal["min", "max"]


@dataclass(frozen=True)
class OtherObjective:
    """A metric beside the first one."""

    metric: str
    mode: Mode

    def minimised(self, value: float) -> float:
        """A value with its sign turned where the metric is maximised; its own inverse."""
        return -value if self.mode == "max" else value


Others = tuple[OtherObjective, ...]


def read_others(objectives: Mapping[str, str] | None) -> Others:
    """Modes by the names of their metrics, such as {"latency_ms": "min"}, in their order.

    Raises:
        ConfigError: they are no such mapping.
    """
    if objectives is None:
        return ()
    if not isinstance(objectives, Mapping):
        raise ConfigError(f"other_objectives: expected a mapping such as {{'latency_ms': 'min'}}, got {objectives!r}")
    for metric, mode in objectives.items():
        if mode not in ("min", "max"):
            raise ConfigError(f"other_objectives: {metric}: expected 'min' or 'max', got {mode!r}")
    return tuple(OtherObjective(metric, cast(Mode, mode)) for metric, mode in objectives.items())


def split(
    metric: str | Sequence[str] | None, mode: str | Sequence[str] | None
) -> tuple[str | None, str | None, Others]:
    """The first metric, its mode, and the others, from one metric or a list, as `OptunaSearch` takes them.

    mode: one for each metric, or one for all.

    Raises:
        ConfigError: the lists do not fit each other, or a metric stands twice.
    """
    if metric is None or isinstance(metric, str):
        if not (mode is None or isinstance(mode, str)):
            raise ConfigError(f"mode={mode!r}: a list of modes needs a list of as many metrics, got metric={metric!r}")
        return metric, mode, ()
    metrics = list(metric)
    modes = [mode or "min"] * len(metrics) if mode is None or isinstance(mode, str) else list(mode)
    if not metrics or len(modes) != len(metrics):
        raise ConfigError(f"expected as many modes as metrics, at least one, got metric={metrics}, mode={modes}")
    if len(set(metrics)) < len(metrics):
        raise ConfigError(f"metric: expected each metric once, got {metrics}")
    first, *others = zip(metrics, modes, strict=True)
    return *first, read_others(dict(others))


def as_written(others: Others) -> dict[str, str]:
    """The inverse of `read_others`."""
    return {other.metric: other.mode for other in others}
