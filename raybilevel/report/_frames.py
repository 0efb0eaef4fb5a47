"""Records as data frames of observations and curves, and values at a cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import pandas as pd

from raybilevel._records.incumbents import incumbent
from raybilevel._records.record import Observation, Record
from raybilevel.report._statistics import Interval, bootstrap
from raybilevel.space import flatten

Axis = Literal["spent", "seconds"]
Value = Callable[[Record, int], float | None]
"""Returns a value of a record's incumbent, given the record and the incumbent's position."""


def observations(records: Sequence[Record]) -> pd.DataFrame:
    """A frame with one row per ended training.

    Its columns are problem, method, seed, training, status, upper_loss, best_upper_loss, lower_loss, cost, spent,
    seconds, each metric by its name, and each hyperparameter as `config/<name>`. A metric with the name of another
    column is `metric/<name>`.
    """
    return pd.DataFrame(
        [row_of(record, number, o) for record in records for number, o in enumerate(record.observations)]
    )


def row_of(record: Record, number: int, observation: Observation) -> dict[str, Any]:
    row: dict[str, Any] = {
        "problem": record.problem_name,
        "method": record.method_name,
        "seed": record.settings.seed,
        "training": number if observation.number is None else observation.number,
        "status": observation.status,
        "upper_loss": observation.upper_loss,
        "best_upper_loss": record.observations[observation.incumbent].upper_loss,
        "lower_loss": observation.lower_loss,
        "cost": observation.cost,
        "spent": observation.spent,
        "seconds": observation.seconds,
    }
    metrics = {f"metric/{name}" if name in row else name: value for name, value in observation.metrics.items()}
    config = {f"config/{'/'.join(path)}": v for path, v in flatten(observation.hyperparameters).items()}
    return {**row, **metrics, **config}


def known(loss: float | None) -> float:
    """F of a training that ran to its end, which has one."""
    assert loss is not None
    return loss


def upper_loss(record: Record, index: int) -> float | None:
    return record.observations[index].upper_loss


def metric(name: str) -> Value:
    return lambda record, index: record.observations[index].metrics.get(name)


def refitted(name: str) -> Value:
    return lambda record, index: record.refits.get(index, {}).get(name)


def at(records: Sequence[Record], value: Value, spent: float) -> Interval | None:
    """The mean over the records, with its interval; None if no record has the value."""
    found = []
    for record in records:
        index = incumbent(record, spent)
        if index is not None and (number := value(record, index)) is not None:
            found.append(number)
    return bootstrap(found) if found else None


def curve(records: Sequence[Record], axis: Axis) -> pd.DataFrame:
    """The best F so far along an axis, "spent" or "seconds": a frame with x, mean, low, high.

    It begins where every record has an F. Before that, the mean would be over a changing set of seeds.
    """
    found: list[dict[str, Any]] = []
    points = sorted({getattr(o, axis) for r in records for o in r.observations})
    last: tuple[float, ...] | None = None
    for x in points:
        # A row only where something changes: each takes a bootstrap.
        values = [best_so_far(r, x, axis) for r in records]
        known = [v for v in values if v is not None]
        if len(known) < len(records) or tuple(known) == last:
            continue
        last = tuple(known)
        interval = bootstrap(known)
        low, high = (interval.mean if v is None else v for v in (interval.low, interval.high))
        found.append({"x": x, "mean": interval.mean, "low": low, "high": high})
    end = max([*points, *(end_of(r, axis) for r in records)], default=0.0)
    # The last value holds until the end of the longest run.
    if found and end > found[-1]["x"]:
        found.append({**found[-1], "x": end})
    return pd.DataFrame(found, columns=["x", "mean", "low", "high"])


def end_of(record: Record, axis: Axis) -> float:
    """The end of a run on an axis."""
    if axis == "spent":
        return record.settings.budget
    return max((trial.seconds[-1] for trial in record.trials if trial.seconds), default=0.0)


def best_so_far(record: Record, x: float, axis: Axis) -> float | None:
    # 1e-9: costs are sums of shares, with rounding errors.
    found = (o.upper_loss for o in record.observations if o.upper_loss is not None and getattr(o, axis) <= x + 1e-9)
    return min(found, default=None)
