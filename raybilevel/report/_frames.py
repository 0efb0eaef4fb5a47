"""Records as tables of numbers: observations, curves and values at a cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd

from benchmarks.suite import incumbent_at
from raybilevel._records.store import Record
from raybilevel.report._statistics import Interval, bootstrap
from raybilevel.space import flatten

Value = Callable[[Record, int], float | None]
"""Something of a record at its incumbent, by the incumbent's index."""


def observations(records: Sequence[Record]) -> pd.DataFrame:
    """One row per ended training: problem, method, seed, status, upper_loss, best_upper_loss, cost, seconds, metrics
    as columns of their own, and each hyperparameter as `config/<name>`."""
    rows = []
    for record in records:
        head = {
            "problem": record["problem_name"],
            "method": record["method_name"],
            "seed": record["settings"]["seed"],
        }
        for number, o in enumerate(record["observations"]):
            best = record["observations"][o["incumbent"]]["upper"]
            rows.append(
                {
                    **head,
                    "training": number,
                    "status": o.get("status", "done" if o["upper"] is not None else "failed"),
                    "upper_loss": o["upper"],
                    "best_upper_loss": best,
                    "lower_loss": o["lower"],
                    "cost": o["cost"],
                    "spent": o.get("spent", o["cost"]),
                    "seconds": o["seconds"],
                    **o["metrics"],
                    **{f"config/{'/'.join(path)}": v for path, v in flatten(o["hyperparameters"]).items()},
                }
            )
    return pd.DataFrame(rows)


def grouped(records: Sequence[Record], key: str) -> dict[str, list[Record]]:
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(str(record[key]), []).append(record)
    return groups


def incumbent(record: Record, spent: float, axis: str = "spent") -> int | None:
    """Index of the incumbent once so much is spent, on the axis "spent", "cost" or "seconds"; None before there is
    one, and where the run was not carried on so far."""
    observations = [{**o, "cost": o.get(axis, o["cost"])} for o in record["observations"]]
    if not observations or not (record["exhausted"] or axis != "spent" or record["settings"]["budget"] >= spent):
        return None
    return incumbent_at(observations, spent)


def upper(record: Record, index: int) -> float | None:
    value: float | None = record["observations"][index]["upper"]
    return value


def metric(name: str) -> Value:
    return lambda record, index: record["observations"][index]["metrics"].get(name)


def refitted(name: str) -> Value:
    return lambda record, index: record["refits"].get(str(index), {}).get(name)


def at(records: Sequence[Record], value: Value, spent: float) -> Interval | None:
    """Mean over the records and its interval; None where no record has the value."""
    found = []
    for record in records:
        index = incumbent(record, spent)
        if index is not None and (number := value(record, index)) is not None:
            found.append(number)
    return bootstrap(found) if found else None


def loss_name(records: Sequence[Record]) -> str | None:
    """The metric that says how good a result is on data that no one has seen, where there is one."""
    names = {name for r in records for o in r["observations"] for name in o["metrics"]}
    return "test_loss" if "test_loss" in names else next((n for n in sorted(names) if n.endswith("_loss")), None)


def curve(records: Sequence[Record], axis: str) -> pd.DataFrame:
    """Best F so far along an axis ("spent" or "seconds"): x, mean, low, high, from where every record has one."""
    found: list[dict[str, Any]] = []
    points = sorted({o.get(axis, o["cost"]) for r in records for o in r["observations"]})
    last: tuple[float, ...] | None = None
    for x in points:
        values = [best_so_far(r, x, axis) for r in records]
        known = [v for v in values if v is not None]
        if len(known) < len(records) or tuple(known) == last:
            continue
        last = tuple(known)
        interval = bootstrap(known)
        low, high = (interval.mean if v is None else v for v in (interval.low, interval.high))
        found.append({"x": x, "mean": interval.mean, "low": low, "high": high})
    end = max([*points, *(end_of(r, axis) for r in records)], default=0.0)
    if found and end > found[-1]["x"]:
        found.append({**found[-1], "x": end})
    return pd.DataFrame(found, columns=["x", "mean", "low", "high"])


def end_of(record: Record, axis: str) -> float:
    """How far a run was carried on."""
    if axis == "spent":
        return float(record["settings"]["budget"])
    return max((trial["seconds"][-1] for trial in record.get("trials", ()) if trial["seconds"]), default=0.0)


def best_so_far(record: Record, x: float, axis: str) -> float | None:
    values = [
        o["upper"] for o in record["observations"] if o["upper"] is not None and o.get(axis, o["cost"]) <= x + 1e-9
    ]
    return min(values, default=None)
