"""Figures of a search by one of raybilevel's own methods: hyperparameters, models and upper-level steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, median
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from raybilevel._records.conclusion import in_words
from raybilevel.report._charts import Chart, Series, Surface
from raybilevel.search_state import SearchState, Training
from raybilevel.space import Parameter, Space

if TYPE_CHECKING:
    from raybilevel._models.value_function import ValueFunction
    from raybilevel.search._state_file import SavedSearch

GRID_POINTS, SLICE_POINTS = 41, 101
MOST_LINES = 60
"""Lines in parallel coordinates. More cannot be told apart."""
MOST_BARS = 24


def charts(saved: SavedSearch, prefix: str = "") -> list[Chart]:
    """Figures of the hyperparameters. `prefix` distinguishes the files of several runs."""
    if len(saved.state.done) < 2:
        return []
    return [slopes(saved, prefix), trained(saved, prefix)]


def inside_charts(saved: SavedSearch, prefix: str = "") -> list[Chart]:
    """Figures of the models and the multipliers."""
    state = saved.state
    if len(state.done) < 2:
        return []
    return [predictions(state, prefix), multipliers(state, prefix), surrogate_error(state, prefix)]


def trained(saved: SavedSearch, prefix: str) -> Chart:
    """All trainings over their hyperparameters, with v_hat where there are one or two of these."""
    if len(saved.parameters) > 2 or any(
        p.choices or p.when for p in saved.parameters
    ):  # those have no scale of numbers
        return parallel(saved, prefix)
    from raybilevel._models.value_function import fit_value_function  # imports botorch, which takes seconds

    state = saved.state
    best = state.best or state.done[0]
    # As many rows as the search's own models have by default.
    fitted = fit_value_function(state.done, torch.tensor(best.unit, dtype=torch.double), True, 500)
    return slice_of(saved, fitted, prefix) if len(saved.parameters) == 1 else contour(saved, fitted, prefix)


def predictions(state: SearchState, prefix: str) -> Chart:
    """What a model predicted for each training, against what was trained: v_hat, or F if the method has no v_hat."""
    of_value = any(t.proposal.predicted_value is not None for t in state.done)
    model, loss, deviations = ("v_hat", "f", ", two deviations") if of_value else ("F_hat", "F", "")
    foretold = [
        (t, expected, t.lower_loss if of_value else t.upper_loss)
        for t in state.done
        if (expected := t.proposal.predicted_value if of_value else t.proposal.predicted_upper_loss) is not None
    ]
    predicted, values = [expected for _, expected, _ in foretold], [value for *_, value in foretold]
    ends = [min([*values, *predicted]), max([*values, *predicted])] if values else []
    series = (
        # Colour 7 is the palette's grey.
        Series("trained = predicted", "line", ends, ends, colour=7),
        Series(
            f"{model}{deviations}", "points", values, predicted,
            error=[2 * (t.proposal.deviation or 0.0) for t, *_ in foretold] if of_value else None,
            notes=[f"training {t.index}" for t, *_ in foretold],
        ),
    )  # fmt: skip
    missed = median(abs(v - p) for v, p in zip(values, predicted, strict=True)) if values else math.nan
    return Chart(
        name=f"{prefix}predictions",
        title=f"{model} against trained values",
        caption=f"What the model of {'the value function' if of_value else 'F'} expected before each training"
        f"{', with two posterior deviations,' if of_value else ''} against the value that the training had. Points on "
        "the line were foreseen.",
        alt=f"{len(values)} predictions; their median error is {missed:.3g}.",
        x_label=f"trained value of {loss}",
        y_label=f"{model}(x)",
        series=series if values else (),
    )


def slice_of(saved: SavedSearch, fitted: ValueFunction, prefix: str) -> Chart:
    """For one hyperparameter: the posterior along it, and the trained values."""
    parameter = saved.parameters[0]
    units, x = axis(parameter, SLICE_POINTS)
    mean = [fitted.mean(u.unsqueeze(0)).item() for u in units]
    deviation = [fitted.deviation(u.unsqueeze(0)).item() for u in units]
    done = saved.state.done
    at = [place(parameter, t, 0) for t in done]
    return Chart(
        name=f"{prefix}value-function",
        title="The value function",
        caption="v_hat, fitted to all trained values and gradients, with two posterior deviations; trained f, and F at "
        "the same weights.",
        alt=f"v_hat lies between {min(mean):.4g} and {max(mean):.4g}; the largest deviation is {max(deviation):.2g}.",
        x_label=parameter.name,
        y_label="loss",
        series=(
            Series(
                "v_hat", "line", x, mean, strong=True,
                low=[m - 2 * d for m, d in zip(mean, deviation, strict=True)],
                high=[m + 2 * d for m, d in zip(mean, deviation, strict=True)],
            ),
            Series("trained f", "points", at, [t.lower_loss for t in done], colour=1),
            Series("trained F", "points", at, [t.upper_loss for t in done], colour=2),
        ),
        x_log=parameter.log,
    )  # fmt: skip


def contour(saved: SavedSearch, fitted: ValueFunction, prefix: str) -> Chart:
    """For two hyperparameters: v_hat over the box, and the path of each trust region."""
    first, second = saved.parameters
    (across, x), (up, y) = axis(first, GRID_POINTS), axis(second, GRID_POINTS)
    z = [[fitted.mean(torch.stack([a, b])).item() for a in across] for b in up]
    state = saved.state
    at = [(t, place(first, t, 0), place(second, t, 1)) for t in state.done]
    series = [
        Series("trained", "points", [a for _, a, _ in at], [b for _, _, b in at], colour=1,
               notes=[f"training {t.index}<br>F {t.upper_loss:.5g}, f {t.lower_loss:.5g}" for t, _, _ in at])
    ]  # fmt: skip
    for number, (region, members) in enumerate(trajectories(state).items()):
        series.append(
            Series(
                f"trust region of training {region}", "line", [place(first, t, 0) for t in members],
                [place(second, t, 1) for t in members], colour=2 + number, strong=True,
            )
        )  # fmt: skip
    best = state.best
    if best is not None:
        series.append(Series("best F", "points", [place(first, best, 0)], [place(second, best, 1)], colour=3))
    return Chart(
        name=f"{prefix}value-function",
        title="The value function and the steps of the search",
        caption="v_hat over the box, fitted to all trained values and gradients. A line joins the trainings of one "
        "trust region in their order: each was proposed by an upper-level step from the weights of the best before it.",
        alt=f"{len(at)} trainings in the plane of {first.name} and {second.name}; {len(series) - 1} paths.",
        x_label=first.name,
        y_label=second.name,
        series=tuple(series),
        surface=Surface("v_hat", x, y, z),
        x_log=first.log,
        y_log=second.log,
    )


def axis(parameter: Parameter, count: int) -> tuple[Tensor, list[float]]:
    """Coordinates of the unit cube along a range of numbers, at most `count`, and their values, all different."""
    units = {float(parameter.to_value(u)): u for u in torch.linspace(0, 1, count, dtype=torch.double).tolist()}
    return torch.tensor(list(units.values()), dtype=torch.double), list(units)


def place(parameter: Parameter, training: Training, coordinate: int) -> float:
    return float(parameter.to_value(training.unit[coordinate]))


def trajectories(state: SearchState) -> dict[int, list[Training]]:
    """The trainings of each trust region: the one that it began at, then the others in the order of their ends."""
    found: dict[int, list[Training]] = {}
    for training in state.done:
        region = training.proposal.region
        if region is not None:
            found.setdefault(region, [state.trainings[region]]).append(training)
    return {region: [t for t in members if t.status == "done"] for region, members in found.items() if len(members) > 1}


def parallel(saved: SavedSearch, prefix: str) -> Chart:
    """For more than two hyperparameters: a line per training, coloured by the rank of its F."""
    best = sorted(saved.state.done, key=lambda t: t.upper_loss)[:MOST_LINES]
    space = Space(saved.parameters)
    names, first = list(space.names), saved.parameters[0]
    # One axis serves all if they have one interval, and then it has its unit.
    own_unit = not any(p.choices or p.when for p in saved.parameters) and all(
        (p.low, p.high, p.log) == (first.low, first.high, first.log) for p in saved.parameters
    )
    series = []
    for number, training in reversed(list(enumerate(best))):  # the best is drawn last, over the others
        shade = 1 - number / max(1, len(best) - 1)
        numbers = [place(p, training, j) for j, p in enumerate(saved.parameters)] if own_unit else list(training.unit)
        series.append(
            Series(
                f"training {saved.state.number(training)}, F {training.upper_loss:.4g}", "line",
                list(range(len(names))), numbers, shade=0.2 + 0.75 * shade, strong=number == 0, in_legend=number == 0,
                notes=[f"{name} = {value}" for name, value in zip(names, values_of(space, training), strict=True)],
            )
        )  # fmt: skip
    top = best[: max(1, len(best) // 4)]
    told = ", ".join(
        f"{name} {min(t.unit[j] for t in top):.2f} to {max(t.unit[j] for t in top):.2f}"
        for j, name in enumerate(names[:16])
    )
    how = "" if own_unit else ", from 0 at a hyperparameter's lower bound to 1 at its upper bound"
    return Chart(
        name=f"{prefix}parallel",
        title="Hyperparameters of all trainings",
        caption=f"Parallel coordinates: each line is a training{how}. Yellow is the lowest F, blue the highest (by "
        "rank).",
        alt=f"Lines of {len(best)} trainings. In shares of the intervals the best quarter has {told}.",
        x_label="",
        y_label="value" if own_unit else "place in its interval",
        series=tuple(series),
        ticks=tuple(short(names)),
        y_log=own_unit and first.log,
        bounds=None if own_unit else (-0.03, 1.03),
    )


def values_of(space: Space, training: Training) -> list[str]:
    """The value of each hyperparameter in words, "-" for those that are not active."""
    active = space.active(torch.tensor(training.unit, dtype=torch.double)).tolist()
    return [
        in_words(p.to_value(u)) if there else "-"
        for p, u, there in zip(space.parameters, training.unit, active, strict=True)
    ]


def short(names: Sequence[str]) -> list[str]:
    """The names without their path, if all have the same one."""
    heads = {name.rpartition("/")[0] for name in names}
    return [name.rpartition("/")[2] for name in names] if len(heads) == 1 else list(names)


def mean_slopes(saved: SavedSearch) -> tuple[dict[str, float], int, bool]:
    """The mean |dF/dx| of each hyperparameter per interval, over trainings with a hypergradient; of f if there is none.

    Trainings above the median F are left out as far as others are there: far from the result a slope says little.

    Returns the slopes by name, the number of trainings, and whether they are of F. A hyperparameter without a gradient,
    e.g. a choice, is not among them.
    """
    done = saved.state.done
    middle = median(t.upper_loss for t in done)
    with_hypergradient = [t for t in done if t.hypergradient]
    of_upper = bool(with_hypergradient)
    used = with_hypergradient if of_upper else [t for t in done if t.lower_gradient]
    used = [t for t in used if t.upper_loss <= middle] or used
    rows = [t.hypergradient or () if of_upper else t.lower_gradient for t in used]
    found = {}
    for j, parameter in enumerate(saved.parameters):
        sizes = [abs(row[j]) for row in rows if not math.isnan(row[j])]
        if sizes:
            found[parameter.name] = fmean(sizes)
    return found, len(rows), of_upper


def importance(saved: SavedSearch) -> dict[str, float]:
    """The share of each hyperparameter in the slopes of F, by name; empty without hypergradients."""
    if len(saved.state.done) < 2:
        return {}
    sizes, _, of_upper = mean_slopes(saved)
    total = sum(sizes.values())
    return {name: size / total for name, size in sizes.items()} if of_upper and total > 0 else {}


def slopes(saved: SavedSearch, prefix: str) -> Chart:
    """The mean slopes of F, or without hypergradients of f, the largest first."""
    sizes, count, of_upper = mean_slopes(saved)
    names = sorted(sizes, key=lambda name: -sizes[name])[:MOST_BARS]
    lanes = tuple(short(names))
    left = f" The largest {len(names)} of {len(sizes)}." if len(sizes) > len(names) else ""
    what, loss, warning = (
        ("|dF/dx|, hypergradients", "F", "Near the result all slopes of F are small.")
        if of_upper
        else ("|df/dx|, Danskin gradients", "the training loss f", "How much F depends on each is not known.")
    )
    return Chart(
        name=f"{prefix}importance",
        title="Importance of hyperparameters" if of_upper else "Slopes of the training loss",
        caption=f"How much {loss} would change between the bounds of a hyperparameter at its mean slope over {count} "
        f"trainings. Those with an F above the median are left out if there are others.{left} {warning}",
        alt=", ".join(f"{lane} {sizes[name]:.3g}" for lane, name in zip(lanes, names, strict=True)) + " per interval.",
        x_label="change of the loss from bound to bound",
        y_label="",
        series=(
            Series(what, "spans", [0.0] * len(names), list(lanes), length=[sizes[name] for name in names],
                   colour=0 if of_upper else 2, in_legend=False),
        ) if names else (),
        lanes=lanes,
    )  # fmt: skip


def multipliers(state: SearchState, prefix: str) -> Chart:
    """The multiplier of each augmented Lagrangian, and the violation of its constraint."""
    steps = [s for s in state.steps if s.multiplier is not None]
    x = [s.number for s in steps]
    series = [Series("multiplier", "points", x, [s.multiplier for s in steps], colour=0)]
    violated = [s for s in steps if s.violation]
    if violated:
        series.append(
            Series("violation", "points", [s.number for s in violated], [s.violation for s in violated], colour=1)
        )
    last = steps[-1] if steps else None
    return Chart(
        name=f"{prefix}multipliers",
        title="Multiplier and violation",
        caption="The multiplier of f - v <= eps in each upper-level step, and how much that constraint is violated at "
        "the end of a descent that goes by v_hat.",
        alt=f"{len(steps)} steps; the last multiplier is {last.multiplier:.3g}; {len(violated)} steps end with a "
        "violation." if last and last.multiplier is not None else "No step.",
        x_label="upper-level step",
        y_label="multiplier, violation",
        series=tuple(series) if steps else (),
        y_log=all((s.multiplier or 0) > 0 for s in steps),
    )  # fmt: skip


def surrogate_error(state: SearchState, prefix: str) -> Chart:
    """The errors of the models' predictions."""
    value = [(t.finished, abs(t.proposal.predicted_value - t.lower_loss)) for t in state.done
             if t.proposal.predicted_value is not None]  # fmt: skip
    upper = [(t.finished, abs(t.proposal.predicted_upper_loss - t.upper_loss)) for t in state.done
             if t.proposal.predicted_upper_loss is not None]  # fmt: skip
    series = []
    for number, (name, errors) in enumerate((("|v_hat - v|", value), ("|F_hat - F|", upper))):
        positive = [(i, e) for i, e in errors if e > 0]  # the axis is logarithmic
        if positive:
            series.append(Series(name, "points", [i for i, _ in positive], [e for _, e in positive], colour=number))
    text = ", ".join(f"{s.name} from {s.y[0]:.2g} to {s.y[-1]:.2g}" for s in series)
    return Chart(
        name=f"{prefix}errors",
        title="Error of the surrogates",
        caption="Distance between the value that a model expected before a training and the one that was trained, in "
        "the order in which trainings ended.",
        alt=f"Errors over the run: {text}.",
        x_label="training, in the order of ends",
        y_label="absolute error",
        series=tuple(series),
        y_log=True,
    )
