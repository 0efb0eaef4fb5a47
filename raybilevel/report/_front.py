"""The Pareto front of a run with several objectives: a figure and a table."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from raybilevel._records.conclusion import hyperparameters, name_of
from raybilevel._records.record import Record
from raybilevel._records.run_folder import search_of
from raybilevel.report._charts import Chart, Series
from raybilevel.report._tables import Table

if TYPE_CHECKING:
    from raybilevel.search._state_file import SavedSearch
    from raybilevel.search_state import Training


def charts(saved: SavedSearch, prefix: str = "") -> list[Chart]:
    """Every objective beside the first against that."""
    chosen = front_of(saved)
    if not chosen:
        return []
    first, found = name_of({"metric": saved.metric}), []
    known = [t for t in saved.state.measured if all(map(math.isfinite, t.others))]
    behind = [t for t in known if t not in chosen]
    for number, other in enumerate(saved.others):

        def points(name: str, trainings: list[Training], colour: int, number: int = number) -> Series:
            values = [reported(saved, t) for t in trainings]
            x, y = [v[0] for v in values], [v[1 + number] for v in values]
            notes = [f"training {saved.state.number(t)}" for t in trainings]
            return Series(name, "points", x, y, colour=colour, strong=colour == 1, notes=notes)

        found.append(Chart(
            f"{prefix}front_{other.metric}",
            f"Pareto front: {other.metric} against {first}",
            f"Each point is a training run, at trained weights. No other has a better {first} than one on the front "
            "without being worse in another objective.",
            f"{len(chosen)} of {len(known)} training runs on the front.",
            first,
            other.metric,
            (points("other training runs", behind, 7), points("Pareto front", list(chosen), 1)),
        ))  # fmt: skip
    return found


def tables(record: Record) -> list[Table]:
    """The trainings of the front, the lowest first objective first."""
    saved = search_of(record)
    if saved is None or not (chosen := front_of(saved)):
        return []
    searched = {o.number: o.hyperparameters for o in record.observations}
    rows = tuple(
        (
            str(number := saved.state.number(training)),
            *(f"{value:.5g}" for value in reported(saved, training)),
            hyperparameters(searched[number]),
        )
        for training in chosen
    )
    heads = ("training", name_of({"metric": saved.metric}), *(other.metric for other in saved.others))
    return [Table(
        "front", "Pareto front", (*heads, "hyperparameters"), rows,
        "Training runs that no other beats in one objective and equals in the rest.",
    )]  # fmt: skip


def reported(saved: SavedSearch, training: Training) -> list[float]:
    """The objectives as they were reported."""
    sign = -1.0 if saved.mode == "max" else 1.0
    others = (other.minimised(value) for other, value in zip(saved.others, training.others, strict=True))
    return [sign * training.upper_loss, *others]


def front_of(saved: SavedSearch) -> tuple[Training, ...]:
    """Empty for a search with one objective."""
    if not saved.others:
        return ()
    from raybilevel._models.pareto import front  # imports botorch, which takes seconds

    return front(saved.state)
