"""Tables of one run: its result against its start, its hyperparameters, its improvements."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING

from raybilevel._lower.paired import Gain
from raybilevel._metrics import UPPER_LOSS
from raybilevel._models.shrinkage import expected_loss
from raybilevel._records.conclusion import in_errors, in_words, with_error
from raybilevel._records.incumbents import loss_name, lowest
from raybilevel._records.record import Observation, Record
from raybilevel._records.run_folder import search_of
from raybilevel._tree import leaves, named
from raybilevel.report import _front as front
from raybilevel.report._frames import known
from raybilevel.report._search import importance
from raybilevel.report._tables import Table

if TYPE_CHECKING:
    from raybilevel.search._state_file import SavedSearch

MOST_ROWS = 64
"""Hyperparameters that the page lists."""

Column = Callable[[int], float | None]
"""A loss of the training at a position of the record."""


def tables(record: Record) -> list[Table]:
    """The result against the start, and the hyperparameters of both."""
    if record.lowest is None:
        return []
    return [*front.tables(record), result(record), hyperparameters(record)]


def result(record: Record) -> Table:
    """Losses of the start, of the best shared value, of the result and of the lowest F; test losses first, the best of
    each column bold."""
    start, best = record.start, record.observations[-1].incumbent
    assert start is not None  # there is an F
    feasible = record.observations[best].feasible
    kept = "" if feasible is None else f"It {'keeps' if feasible else 'breaks'} the constraints. "
    # Where constraints can be kept, of the trainings that keep them.
    least = lowest(None if feasible and o.feasible is False else o.upper_loss for o in record.observations)
    rows = {start: "start"} if best != start else {best: "result, the start"}
    if record.shared not in (None, start, best):
        rows[record.shared] = "best shared value tried"
    rows.setdefault(best, "result")
    rows.setdefault(least, "lowest F")
    columns = columns_of(record)
    columns = {head: value for head, value in columns.items() if any(value(row) is not None for row in rows)}
    cells = [
        (f"{name} (training {record.number_of(row)})", *(shown(head, row, rows, columns[head]) for head in columns))
        for row, name in rows.items()
    ]
    if best != start:
        against = [("against the start", *(change(value(start), value(best)) for value in columns.values()))]
        if record.gain is not None:
            against.append(("gain over the start", *(gain_in(head, record.gain, record) for head in columns)))
        if record.gain_over_shared is not None and record.shared != start:
            gain = record.gain_over_shared
            against.append(("gain over the shared value", *(gain_in(head, gain, record) for head in columns)))
        place = 1 + list(rows).index(best)
        cells[place:place] = against
    return Table(
        "result",
        "Result",
        ("", *columns),
        tuple(cells),
        f"The result is the training that the method returns. {kept}In bold the lowest loss of each column. "
        "F takes part in the search, and the test loss does not." + chance(record),
    )


def gain_in(head: str, gain: Gain, record: Record) -> str:
    """A gain and its standard error in the column that they are of."""
    of = "test loss" if gain.of == "test_loss" else f_name(record)
    return with_error(asdict(gain)) if head == of else "-"


def chance(record: Record) -> str:
    """Whether chance may explain the gain over the start; empty where that is not known."""
    if record.gain is None:
        return ""
    return f" Behind a gain is its standard error. {in_errors(asdict(record.gain))}."


def f_name(record: Record) -> str:
    """The heading of F."""
    return "F (validation loss)" if record.metric == UPPER_LOSS else record.metric


def columns_of(record: Record) -> dict[str, Column]:
    """The columns of the table of results by their headings, test columns first."""
    observations, test = record.observations, loss_name([record])
    metrics = dict.fromkeys(name for o in observations for name in o.metrics)
    found: dict[str, Column] = {}
    for name in sorted(metrics, key=lambda name: name != test):
        head = name.replace("_", " ")
        found[head] = lambda i, name=name: observations[i].metrics.get(name)  # type: ignore[misc]
        found[f"{head} after refit"] = lambda i, name=name: record.refits.get(i, {}).get(name)  # type: ignore[misc]
    found[f_name(record)] = lambda i: observations[i].upper_loss
    saved = search_of(record)
    if saved is not None and (shrinkage := saved.state.shrinkage) is not None:
        found["F expected on new data"] = lambda i: expected_loss(
            shrinkage, observations[i].unit, known(observations[i].upper_loss)
        )
    return found


def shown(head: str, row: int, rows: Mapping[int, str], value: Column) -> str:
    """A number; a loss is bold if no other row has a lower one."""
    loss = value(row)
    if loss is None:
        return "-"
    others = [other for r in rows if (other := value(r)) is not None]
    text = f"{loss:.5g}"
    # Of other metrics, e.g. an accuracy, it is not known which end is good.
    return f"**{text}**" if loss <= min(others) and "loss" in head else text


def change(before: float | None, after: float | None) -> str:
    """How much lower or higher a number is than before."""
    if before is None or after is None or before == 0:
        return "-"
    share = (after - before) / abs(before)
    return f"{abs(share):.1%} {'lower' if share <= 0 else 'higher'}"


def hyperparameters(record: Record) -> Table:
    """The hyperparameters of the result in their own units, the most important ones first."""
    assert record.start is not None  # there is an F
    start, best = (record.observations[i] for i in (record.start, record.observations[-1].incumbent))
    saved = search_of(record)
    at_start = {named(path): value for path, value in leaves(start.hyperparameters).items()}
    found = {named(path): value for path, value in leaves(best.hyperparameters).items()}
    shares = {} if saved is None else importance(saved)
    within = intervals(record, saved)
    names = sorted(found, key=lambda name: -shares.get(name, -1.0))
    rows = []
    for name in names[:MOST_ROWS]:
        share = [f"{shares[name]:.0%}" if name in shares else "-"] if shares else []
        values = in_words(found[name]), in_words(at_start.get(name, "-"))
        rows.append((name, f"**{values[0]}**", *share, values[1], within.get(name, "-")))
    more = len(names) - len(rows)
    note = f"The other {more} are among the observations (CSV at the top). " if more else ""
    if shares:
        note += "Importance is the share of the mean slopes of F in the figure below. "
    return Table(
        "hyperparameters",
        "Hyperparameters",
        ("name", "result", *(["importance"] if shares else []), "start", "searched"),
        tuple(rows),
        note + supported(saved),
    )


def intervals(record: Record, saved: SavedSearch | None) -> dict[str, str]:
    """What was searched, by the names of hyperparameters."""
    found = {p.name: f"{p.low:.4g} to {p.high:.4g}" for p in record.space}
    if saved is not None:
        found |= {p.name: ", ".join(map(str, p.choices)) for p in saved.parameters if p.choices}
    return found


def supported(saved: SavedSearch | None) -> str:
    """How many hyperparameters the validation data determine; empty where that is not known."""
    shrinkage = None if saved is None else saved.state.shrinkage
    if saved is None or shrinkage is None:
        return ""
    d = len(saved.parameters)
    together = " The search holds those of a group together as far as the data do not tell them apart."
    return (
        f"{shrinkage.examples} validation examples determine about {shrinkage.supported:.1f} of {d} hyperparameters."
        + (together if shrinkage.applied else "")
    )


def improvements(record: Record) -> Table:
    """The completed trainings that were better than all before them, with their numbers; of those that keep the
    constraints, if there are any."""
    found: dict[int, Observation] = {}
    least = math.inf
    for place, o in enumerate(record.observations):
        if o.feasible is not False and o.upper_loss is not None and o.upper_loss < least:
            least = o.upper_loss
            found[place] = o
    tests = [o.metrics["test_loss"] for o in found.values() if "test_loss" in o.metrics]
    rows = []
    for place, o in found.items():
        test, upper = o.metrics.get("test_loss"), known(o.upper_loss)
        told = "-" if test is None else f"**{test:.5g}**" if test == min(tests) else f"{test:.5g}"
        lowest_f = f"**{upper:.5g}**" if upper == least else f"{upper:.5g}"
        rows.append((str(record.number_of(place)), told, lowest_f, f"{o.cost:.1f}"))
    return Table("improvements", "Improvements", ("training", "test loss", "F", "cost"), tuple(rows))


def diagnostics(record: Record) -> Table:
    """The method's own numbers, as in summary.json."""
    rows = [
        (name.replace("_", " "), f"{value:.3g}")
        for name, value in record.diagnostics.items()
        if value is not None and math.isfinite(value)
    ]
    return Table(
        "diagnostics", "Diagnostics", ("what", "value"), tuple(rows), "The page on summary.json explains each."
    )
