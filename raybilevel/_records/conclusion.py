"""What to make of a run, in three lines of plain words: what was found, whether it helped, how sure that is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from raybilevel._metrics import UPPER_LOSS
from raybilevel._records.record import Record
from raybilevel._tree import leaves, named

MOST_SHOWN = 5
"""Hyperparameters that are written out on one line."""

SAME = 0.01
"""Relative difference of F by the model up to which it is not worth a word."""

NEARER = {0.5: "half as far apart", 0.25: "a quarter as far apart", 0.0: "equal"}
"""In a refit, by their spread relative to the result's."""

UNDER_WAY = "under way"
HOW_SURE = {
    "converged": "the search had nothing better to propose",
    "budget exhausted": "the search ended with its trainings, and more may find better",
    "surrogate too poor": "not very. The models predicted poorly what trainings gave, so other points may be as good",
    "validation set overfitted": "not very. The test loss rose while F fell, so the validation data are overfitted",
    "not feasible": "no training kept every constraint. This one is nearest to that",
    "no result": "no training ran to its end",
    UNDER_WAY: "not yet. The run has not ended, or was stopped",
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
    seen, by_model = best["upper_loss"], best.get("expected_upper_loss")
    differs = by_model is not None and abs(by_model - seen) > SAME * abs(seen)
    luck = f" (by the model {by_model:.4g})" if differs else ""
    found = f"{name_of(summary)} {seen:.4g}{luck} at training {best['training']}, {words}"
    if members := summary.get("pareto_front"):
        found = f"a Pareto front of {len(members)} trainings, from {found} {to_the_others(summary)}"
    found += kept(summary)
    if (expected := summary["new_data"]) is not None:
        sure += f". {expected['in_words']}"
    return Conclusion(found, helped(summary), sure)


def kept(summary: Mapping[str, Any]) -> str:
    """Which constraints the best training keeps, and which it breaks, with its metrics; empty without constraints."""
    # Summaries of earlier versions have none.
    shown, breaks = [], not summary["best"].get("feasible", True)
    for metric, bound in summary.get("constraints", {}).items():
        value = summary["metrics"].get(metric)
        shown.append(f"{metric} {bound}" + ("" if value is None else f" ({value:.4g})"))
    if not shown:
        return ""
    return f". {'Not feasible' if breaks else 'Feasible'}: {', '.join(shown)}"


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


def helped(summary: Mapping[str, Any]) -> str:
    """Whether the result is better than the start, by the test loss if there is one."""
    # Summaries of earlier versions have no gain.
    best, start, gain = summary["best"], summary["start"], summary.get("gain")
    if start is None:  # all trainings were stopped
        return "not known. There is no start to compare with"
    at_start = f"training {start['training']}, the start"
    if not start.get("feasible", True):
        at_start += ", which is not feasible"
    before, after = start["test_loss"], best["test_loss"]
    then = after_refit(summary)
    if best["training"] == start["training"]:
        return ". ".join(["no", f"Nothing was better than {at_start}", *then])
    metric = name_of(summary).removesuffix(" (validation loss)")
    by_chance = [*([] if gain is None else [in_errors(gain)]), *against_shared(summary)]
    if before is None or after is None:
        fell = f"{metric} was {start['upper_loss']:.4g} at {at_start}"
        return ". ".join([f"by {metric} alone, as there is no test loss", fell, *by_chance, *then])
    fell = f"Test loss {after:.4g}, which was {before:.4g} at {at_start}"
    sure = gain is None or gain["of"] != "test_loss" or beyond_errors(gain)
    verdict = "not on new data" if after >= before else "yes" if sure else "perhaps"
    return ". ".join([verdict, fell, *by_chance, *then])


def after_refit(summary: Mapping[str, Any]) -> list[str]:
    """The loss after the refit, and why it is not with the result of the search where that is so."""
    # Summaries of earlier versions have no choice.
    loss, chosen = summary["best"]["test_loss_refit"], summary.get("refit")
    words = [] if loss is None else [f"Test loss {loss:.4g} after a refit on all data"]
    if chosen is None or chosen["gain"] is None:
        return words
    gain = chosen["gain"]
    nearer = f"For the refit hyperparameters of a kind are {NEARER[chosen['spread']]}"
    why = f"by trainings on halves of the {gain['examples']} validation examples the loss is then lower"
    return [*words, f"{nearer}: {why} by {with_error(gain)}"]


def in_errors(gain: Mapping[str, Any], than: str = "") -> str:
    """A gain with its standard error, and whether that may explain it. than: what it is over, if not the start."""
    metric, kind = ("Test loss", "test") if gain["of"] == "test_loss" else ("F", "validation")
    side, where = "lower" if gain["mean"] >= 0 else "higher", "beyond" if beyond_errors(gain) else "within"
    over = than or f" over {gain['examples']} {kind} examples"
    return f"{metric} {side} by {with_error(gain)}{over}, {where} two standard errors"


def against_shared(summary: Mapping[str, Any]) -> list[str]:
    """The result beside the best training with one value for all hyperparameters of a kind; nothing where none are."""
    # Summaries of earlier versions have none.
    best, start, shared = summary["best"], summary["start"], summary.get("shared")
    if shared is None:
        return []
    tried = "the only one tried" if shared["tried"] == 1 else f"the best of {shared['tried']} tried"
    if shared["training"] == best["training"]:
        return [f"The result has one shared value, {tried}"]
    if shared["training"] == start["training"]:
        return [f"The start has one shared value, {tried}"]
    value = f"one shared value (training {shared['training']}, {tried})"
    if (gain := summary.get("gain_over_shared")) is not None:
        return [in_errors(gain, f" than with {value}")]
    if shared["test_loss"] is not None:
        return [f"Test loss {shared['test_loss']:.4g} with {value}"]
    return [f"{name_of(summary).removesuffix(' (validation loss)')} {shared['upper_loss']:.4g} with {value}"]


def with_error(gain: Mapping[str, Any]) -> str:
    """The size of a gain and its standard error, to two digits of the error: 0.3413 and 0.0214 are 0.341 ± 0.021."""
    size, error = abs(gain["mean"]), gain["standard_error"]
    places = max(0, 1 - math.floor(math.log10(error))) if error > 0 else 4
    return f"{size:.{places}f} ± {error:.{places}f}"


def beyond_errors(gain: Mapping[str, Any]) -> bool:
    """Whether a gain or loss is larger than two standard errors."""
    return bool(abs(gain["mean"]) > 2 * gain["standard_error"])


def hyperparameters(best: Mapping[str, Any], start: Mapping[str, Any] | None = None, most: int = MOST_SHOWN) -> str:
    """Hyperparameters in their own units. Of many, those that are furthest from the start, and the number of others."""
    flat = leaves(best)  # an entry of a list is a hyperparameter, too
    before = leaves(start or {})
    names = list(flat)
    if len(names) > most:
        furthest = sorted(names, key=lambda name: -distance(before.get(name), flat[name]))[:most]
        # In the order of the space again.
        names = [name for name in names if name in furthest]
    # Without spaces, so that a line does not break between a name and its value.
    group, short = without_group([named(name) for name in names])
    shown = group + ", ".join(f"{word}={in_words(flat[name])}" for word, name in zip(short, names, strict=True))
    others = len(flat) - len(names)
    return shown + (f" and {others} more" if others else "")


def without_group(names: list[str]) -> tuple[str, list[str]]:
    """The group that all names are of, "decay: ", and the names without it: of several, none of which is a number."""
    groups = {name.rpartition("/")[0] for name in names}
    short = [name.rpartition("/")[2] for name in names]
    if len(names) < 2 or len(groups) > 1 or "" in groups or any(name.isdigit() for name in short):
        return "", names
    return f"{groups.pop()}: ", short


def distance(before: Any, after: Any) -> float:
    """How far a value has moved: by its ratio, so that it needs no bounds. A value that is no number is 0 or 1 away."""
    if before == after:
        return 0.0
    if isinstance(before, int | float) and isinstance(after, int | float):
        return abs(after - before) / max(abs(after), abs(before))
    return 1.0


def in_words(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
