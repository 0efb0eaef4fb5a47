"""What a run would return once so much is spent, and the values of records there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from raybilevel._records.record import Observation, Record

Axis = Literal["cost", "spent", "seconds"]


def lowest(losses: Iterable[float | None]) -> int:
    """Position of the lowest F, where None is a training without one; 0 before there is one."""
    known = [(loss, position) for position, loss in enumerate(losses) if loss is not None]
    return min(known)[1] if known else 0


def incumbent_at(observations: Sequence[Observation], amount: float, axis: Axis = "cost") -> int | None:
    """Position of the incumbent once `amount` is spent; None before the first training that ran to its end."""
    index = None
    for observation in observations:
        if getattr(observation, axis) <= amount + 1e-9:
            index = observation.incumbent
    return None if index is None or observations[index].upper_loss is None else index


def incumbent(record: Record, amount: float, axis: Axis = "spent") -> int | None:
    """The same of a record; None also where the run was not carried on so far."""
    reached = record.exhausted or axis == "seconds" or record.settings.budget >= amount
    return incumbent_at(record.observations, amount, axis) if reached else None


def grouped(records: Iterable[Record], key: Literal["problem_name", "method_name"]) -> dict[str, list[Record]]:
    """Records by problem or method, in the order in which those come first."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(getattr(record, key), []).append(record)
    return groups


def loss_name(records: Iterable[Record]) -> str | None:
    """The metric that says how good a result is on data that no one has seen, where there is one."""
    names = {name for record in records for observation in record.observations for name in observation.metrics}
    return "test_loss" if "test_loss" in names else next((n for n in sorted(names) if n.endswith("_loss")), None)
