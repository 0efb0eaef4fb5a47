"""The incumbent of a run at a given cost, and records in groups."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from raybilevel._records.record import Observation, Record

Axis = Literal["cost", "spent", "seconds"]


def lowest(losses: Iterable[float | None]) -> int:
    """Position of the lowest F. None stands for a training without an F; 0 if there is no F yet."""
    known = [(loss, position) for position, loss in enumerate(losses) if loss is not None]
    # Of equal losses the earlier one.
    return min(known)[1] if known else 0


def incumbent_at(observations: Sequence[Observation], amount: float, axis: Axis = "cost") -> int | None:
    """Position of the incumbent when `amount` has been spent; None before the first completed training."""
    index = None
    for observation in observations:
        if getattr(observation, axis) <= amount + 1e-9:  # costs are sums of shares, with rounding errors
            index = observation.incumbent
    return None if index is None or observations[index].upper_loss is None else index


def incumbent(record: Record, amount: float, axis: Axis = "spent") -> int | None:
    """Position of a record's incumbent when `amount` has been spent.

    None before the first completed training, and if the budget of the run was lower than that.
    """
    # A run that exhausted its method stays where it is, so its incumbent holds for any amount. Seconds
    # cannot be compared with the budget, which may have another unit.
    reached = record.exhausted or axis == "seconds" or record.settings.budget >= amount
    return incumbent_at(record.observations, amount, axis) if reached else None


def grouped(records: Iterable[Record], key: Literal["problem_name", "method_name"]) -> dict[str, list[Record]]:
    """Records by problem or method, in the order of their first records."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(getattr(record, key), []).append(record)
    return groups


def loss_name(records: Iterable[Record]) -> str | None:
    """The metric for the loss on test data: "test_loss", else the first that ends in "_loss"; None without one."""
    names = {name for record in records for observation in record.observations for name in observation.metrics}
    return "test_loss" if "test_loss" in names else next((n for n in sorted(names) if n.endswith("_loss")), None)
