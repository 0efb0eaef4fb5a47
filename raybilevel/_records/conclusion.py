"""What to make of a run, in three lines of plain words: what was found, whether it helped, how sure that is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from raybilevel._metrics import UPPER_LOSS
from raybilevel._records.record import Record
from raybilevel._tree import leaves, named

MOST_SHOWN = 5
"""Hyperparameters that are written out on one line."""

UNDER_WAY = "under way"
HOW_SURE = {
    "converged": "the search had nothing better to propose",
    "budget exhausted": "the search ended with its trainings, and more may find better",
    "surrogate too poor": "not very; the models predicted poorly what trainings gave, so other points may be as good",
    "validation set overfitted": "not very; the test loss rose while F fell, so the validation data are overfitted",
    "not feasible": "no training kept every constraint; this one is nearest to that",
    "no result": "no training ran to its end",
    UNDER_WAY: "not yet; the run has not ended, or was stopped",
}
"""By the verdict; of a run without one, `UNDER_WAY`."""


class Conclusion(NamedTuple):
    found: str
    helped: str
    sure: str

    @property
    def lines(self) -> tuple[str, str, str]:
        return f"Found: {self.found}.", f"Helped: {self.helped}.", f"How sure: {self.sure}."


def conclude(summary: Mapping[str, Any]) -> Conclusion:
    """summary: as in `summary.json`."""
    best, start, sure = summary["best"], summary["start"], HOW_SURE[summary["verdict"]]
    if best is None:
        return Conclusion("nothing", "no", sure)
    words = hyperparameters(best["hyperparameters"], start and start["hyperparameters"])
    seen, by_model = (None if f is None else f"{f:.4g}" for f in (best["upper_loss"], best.get("expected_upper_loss")))
    luck = "" if by_model in (None, seen) else f" (by the model {by_model})"
    found = f"{name_of(summary)} {seen}{luck} at training {best['training']}, {words}{kept(summary)}"
    if members := summary.get("pareto_front"):
        found = f"a Pareto front of {len(members)} trainings, from {found} {to_the_others(summary)}"
    if (expected := summary["new_data"]) is not None:
        # `capitalize` would write an F within the words as f.
        sure += f". {expected['in_words'][:1].upper()}{expected['in_words'][1:]}"
    return Conclusion(found, helped(best, start, name_of(summary)), sure)


def kept(summary: Mapping[str, Any]) -> str:
    """Which constraints the best training keeps, and which it breaks, with its metrics; empty without constraints."""
    # Summaries of earlier versions have none.
    shown, breaks = [], not summary["best"].get("feasible", True)
    for metric, bound in summary.get("constraints", {}).items():
        value = summary["metrics"].get(metric)
        shown.append(f"{metric} {bound}" + ("" if value is None else f" ({value:.4g})"))
    if not shown:
        return ""
    return f"; {'not ' if breaks else ''}feasible: {', '.join(shown)}"


def to_the_others(summary: Mapping[str, Any]) -> str:
    """The other ends of a Pareto front."""
    ends = []
    for metric, mode in summary["other_objectives"].items():
        end = (min if mode == "min" else max)(summary["pareto_front"], key=lambda t: t["other_objectives"][metric])
        ends.append(f"{metric} {end['other_objectives'][metric]:.4g} at training {end['training']}")
    return f"to {' and '.join(ends)}"


def so_far(record: Record) -> Conclusion:
    """What a run has found that has no summary yet."""
    observations = record.observations
    sign, metric = record.objective

    def told(position: int) -> dict[str, Any]:
        o = observations[position]
        return {
            "training": record.number_of(position),
            "hyperparameters": o.hyperparameters,
            "upper_loss": sign * (o.upper_loss or 0.0),
            "test_loss": o.metrics.get("test_loss"),
            "test_loss_refit": None,
            "feasible": o.feasible is not False,
        }

    done = [i for i, o in enumerate(observations) if o.upper_loss is not None]
    best = min(done, key=lambda i: (observations[i].feasible is False, observations[i].upper_loss or 0.0), default=None)
    start = record.start
    return conclude({
        "metric": metric,
        "best": None if best is None else told(best),
        "start": None if start is None else told(start),
        "verdict": UNDER_WAY,
        "new_data": None,
    })  # fmt: skip


def name_of(summary: Mapping[str, Any]) -> str:
    """Of what was optimised."""
    metric: str = summary["metric"]
    return "F (validation loss)" if metric == UPPER_LOSS else metric


def helped(best: Mapping[str, Any], start: Mapping[str, Any] | None, metric: str) -> str:
    """Whether the result is better than the start, by the test loss if there is one.

    start: None if all trainings were stopped.
    """
    if start is None:
        return "not known; there is no start to compare with"
    at_start = f"training {start['training']}, the start"
    if not start.get("feasible", True):
        at_start += ", which is not feasible"
    before, after = start["test_loss"], best["test_loss"]
    refit = best["test_loss_refit"]
    then = "" if refit is None else f"; test loss {refit:.4g} after a refit on all data"
    if best["training"] == start["training"]:
        return f"no; nothing was better than {at_start}{then}"
    metric = metric.removesuffix(" (validation loss)")
    fell = f"{metric} was {start['upper_loss']:.4g} at {at_start}"
    if before is None or after is None:
        return f"by {metric} alone, as there is no test loss; {fell}{then}"
    fell = f"test loss {after:.4g}, which was {before:.4g} at {at_start}"
    return f"{'yes' if after < before else 'not on new data'}; {fell}{then}"


def hyperparameters(best: Mapping[str, Any], start: Mapping[str, Any] | None = None, most: int = MOST_SHOWN) -> str:
    """Hyperparameters in their own units. Of many, those that are furthest from the start, and the number of others."""
    flat = leaves(best)  # an entry of a list is a hyperparameter, too
    before = leaves(start or {})
    names = list(flat)
    if len(names) > most:
        furthest = sorted(names, key=lambda name: -distance(before.get(name), flat[name]))[:most]
        # In the order of the space again.
        names = [name for name in names if name in furthest]
    shown = ", ".join(f"{named(name)} {in_words(flat[name])}" for name in names)
    others = len(flat) - len(names)
    return shown + (f" and {others} more" if others else "")


def distance(before: Any, after: Any) -> float:
    """How far a value has moved: by its ratio, so that it needs no bounds. A value that is no number is 0 or 1 away."""
    if before == after:
        return 0.0
    if isinstance(before, int | float) and isinstance(after, int | float):
        return abs(after - before) / max(abs(after), abs(before))
    return 1.0


def in_words(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
