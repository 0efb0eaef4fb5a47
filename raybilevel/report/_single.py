"""Figures and tables of one run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean
from typing import Any

import torch

from raybilevel._models.value_function import ValueFunction, fit_value_function
from raybilevel._records.store import Record
from raybilevel.report._charts import Chart, Series, Surface
from raybilevel.report._comparison import Table
from raybilevel.report._sources import search_of
from raybilevel.search._state_file import SavedSearch
from raybilevel.search_state import SearchState, Training
from raybilevel.space import flatten

GRID_POINTS, SLICE_POINTS = 41, 101
MOST_LINES = 60
"""Lines in parallel coordinates; more are a blot."""


def charts(record: Record, prefix: str = "") -> list[Chart]:
    """Every figure that the record has the data for; `prefix` distinguishes the files of several runs."""
    found = [progress(record, prefix), path_of_incumbent(record, prefix)]
    saved = search_of(record)
    if saved is not None and len(saved.state.done) >= 2:
        found += [
            *value_function(saved, prefix),
            multipliers(saved.state, prefix),
            surrogate_error(saved.state, prefix),
        ]
    found += [timeline(record, prefix), cost_split(record, saved, prefix)]
    return [chart for chart in found if chart.series]


def progress(record: Record, prefix: str) -> Chart:
    """F of each training, the best so far, and the test loss of the incumbent."""
    done = [(i, o) for i, o in enumerate(record["observations"]) if o["upper"] is not None]
    origins = origins_of(record)
    series = []
    for number, origin in enumerate(dict.fromkeys(origins.get(o.get("trial", ""), "training") for _, o in done), 1):
        chosen = [(i, o) for i, o in done if origins.get(o.get("trial", ""), "training") == origin]
        notes = [describe(o["hyperparameters"]) for _, o in chosen]
        series.append(
            Series(origin, "points", [o["cost"] for _, o in chosen], [o["upper"] for _, o in chosen], colour=number,
                   notes=notes)
        )  # fmt: skip
    incumbents = [o["incumbent"] for _, o in done]
    best = [record["observations"][i]["upper"] for i in incumbents]
    costs = [o["cost"] for _, o in done]
    series.append(Series("best so far", "steps", costs, best, strong=True))
    tests = [record["observations"][i]["metrics"].get("test_loss") for i in incumbents]
    if all(t is not None for t in tests) and tests:
        series.append(Series("test loss of the best", "steps", costs, tests, colour=7))
    everything = [y for s in series for y in s.y]
    return Chart(
        name=f"{prefix}progress",
        title="F of each training",
        caption="Validation loss F at the trained weights against cost, in trainings with upper-level steps charged; "
        "points by where the proposal came from. The test loss takes no part in the search.",
        alt=f"{len(done)} trainings; the best F falls from {best[0]:.4g} to {best[-1]:.4g}."
        if best
        else "No training.",
        x_label="cost, in trainings",
        y_label="loss",
        series=tuple(series),
        y_log=bool(everything) and min(everything) > 0,
    )


def origins_of(record: Record) -> dict[str, str]:
    saved = search_of(record)
    if saved is None:
        return {}
    names = {"start": "start design", "region": "trust region", "global": "whole box", "given": "given",
             "fill": "space-filling", "unknown": "from elsewhere"}  # fmt: skip
    origins = {trial: saved.state.trainings[index].proposal.origin for trial, index in saved.trials.items()}
    return {trial: names.get(origin, origin) for trial, origin in origins.items()}


def describe(hyperparameters: dict[str, Any]) -> str:
    flat = [f"{'/'.join(path)} = {value:.3g}" for path, value in flatten(hyperparameters).items()]
    return "<br>".join([*flat[:8], *([f"and {len(flat) - 8} more"] if len(flat) > 8 else [])])


def path_of_incumbent(record: Record, prefix: str) -> Chart:
    """Where the best hyperparameters so far lie in their intervals."""
    done = [o for o in record["observations"] if o["upper"] is not None]
    names = [p["name"] for p in record["space"]]
    best = [record["observations"][o["incumbent"]] for o in done]
    shown = sorted(range(len(names)), key=lambda j: -spread([b["unit"][j] for b in best]))[:8]
    series = tuple(
        Series(names[j], "steps", [o["cost"] for o in done], [b["unit"][j] for b in best], colour=number)
        for number, j in enumerate(sorted(shown))
    )
    left = f" The {len(shown)} that moved most of {len(names)}." if len(names) > len(shown) else ""
    return Chart(
        name=f"{prefix}path",
        title="Path of the incumbent",
        caption="Each hyperparameter of the best training so far, from 0 at its lower bound to 1 at its upper bound, "
        f"on the scale that is searched.{left}",
        alt="Steps of "
        + ", ".join(f"{s.name} from {s.y[0]:.2f} to {s.y[-1]:.2f}" for s in series if s.y)
        + ", in shares of the interval.",
        x_label="cost, in trainings",
        y_label="place in its interval",
        series=series,
        bounds=(-0.03, 1.03),
    )


def spread(values: Sequence[float]) -> float:
    return max(values) - min(values) if values else 0.0


# The value function.


def value_function(saved: SavedSearch, prefix: str) -> list[Chart]:
    """v_hat with its uncertainty against the trained values, as the dimension allows."""
    state, dimension = saved.state, len(saved.parameters)
    best = state.best or state.done[0]
    fitted = fit_value_function(state.done, torch.tensor(best.unit, dtype=torch.double), True, 500)
    found = [predictions(state, prefix)]
    if dimension == 1:
        found.append(slice_of(saved, fitted, prefix))
    elif dimension == 2:
        found.append(contour(saved, fitted, prefix))
    else:
        found.append(parallel(saved, prefix))
    found.append(sensitivities(saved, prefix))
    return found


def predictions(state: SearchState, prefix: str) -> Chart:
    """v_hat before a training against the value that it had."""
    foretold = [t for t in state.done if t.proposal.predicted_value is not None]
    values = [t.lower_loss for t in foretold]
    predicted = [float(t.proposal.predicted_value or 0.0) for t in foretold]
    deviations = [2 * (t.proposal.deviation or 0.0) for t in foretold]
    ends = [min([*values, *predicted]), max([*values, *predicted])] if values else []
    series = (
        Series("trained = predicted", "line", ends, ends, colour=7),
        Series(
            "v_hat, two deviations", "points", values, predicted, error=deviations,
            notes=[f"training {t.index}" for t in foretold],
        ),
    )  # fmt: skip
    covered = sum(abs(v - p) <= d for v, p, d in zip(values, predicted, deviations, strict=True))
    return Chart(
        name=f"{prefix}predictions",
        title="v_hat against trained values",
        caption="What the model of the value function expected before each training, with two posterior deviations, "
        "against the value that the training had. Points on the line were foreseen.",
        alt=f"{len(values)} predictions; {covered} of the trained values lie within two deviations.",
        x_label="trained value f(x, y)",
        y_label="v_hat(x)",
        series=series if values else (),
    )


def slice_of(saved: SavedSearch, fitted: ValueFunction, prefix: str) -> Chart:
    """One hyperparameter: the posterior along it, and the trained values."""
    parameter = saved.parameters[0]
    units = torch.linspace(0, 1, SLICE_POINTS, dtype=torch.double)
    mean = [fitted.mean(u.unsqueeze(0)).item() for u in units]
    deviation = [fitted.deviation(u.unsqueeze(0)).item() for u in units]
    x = [parameter.decode(u).item() for u in units]
    done = saved.state.done
    at = [parameter.decode(torch.tensor(t.unit[0], dtype=torch.double)).item() for t in done]
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
    """Two hyperparameters: v_hat over the box, and from where to where the search stepped."""
    first, second = saved.parameters
    units = torch.linspace(0, 1, GRID_POINTS, dtype=torch.double)
    z = [[fitted.mean(torch.stack([a, b])).item() for a in units] for b in units]
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
        surface=Surface("v_hat", [first.decode(u).item() for u in units], [second.decode(u).item() for u in units], z),
        x_log=first.log,
        y_log=second.log,
    )


def place(parameter: Any, training: Training, coordinate: int) -> float:
    return float(parameter.decode(torch.tensor(training.unit[coordinate], dtype=torch.double)).item())


def trajectories(state: SearchState) -> dict[int, list[Training]]:
    """The trainings of each trust region after the one that began it, in the order in which they ended."""
    found: dict[int, list[Training]] = {}
    for training in state.done:
        region = training.proposal.region
        if region is not None:
            found.setdefault(region, [state.trainings[region]]).append(training)
    return {region: [t for t in members if t.status == "done"] for region, members in found.items() if len(members) > 1}


def parallel(saved: SavedSearch, prefix: str) -> Chart:
    """More than two hyperparameters: a line per training, coloured by the rank of its F."""
    best = sorted(saved.state.done, key=lambda t: t.upper_loss)[:MOST_LINES]
    names = [p.name for p in saved.parameters]
    series = []
    for number, training in reversed(list(enumerate(best))):
        shade = 1 - number / max(1, len(best) - 1)
        series.append(
            Series(
                f"training {training.index}, F {training.upper_loss:.4g}", "line", list(range(len(names))),
                list(training.unit), shade=0.2 + 0.75 * shade, strong=number == 0, in_legend=number == 0,
                notes=[f"{name} = {place(p, training, j):.3g}" for j, (name, p) in
                       enumerate(zip(names, saved.parameters, strict=True))],
            )
        )  # fmt: skip
    top = best[: max(1, len(best) // 4)]
    told = ", ".join(
        f"{name} {min(t.unit[j] for t in top):.2f} to {max(t.unit[j] for t in top):.2f}"
        for j, name in enumerate(names[:16])
    )
    return Chart(
        name=f"{prefix}parallel",
        title="Hyperparameters of all trainings",
        caption="Parallel coordinates: each line is a training, from 0 at a hyperparameter's lower bound to 1 at its "
        "upper bound; yellow is the lowest F, blue the highest (by rank).",
        alt=f"Lines of {len(best)} trainings. The best quarter has {told}.",
        x_label="",
        y_label="place in its interval",
        series=tuple(series),
        ticks=tuple(short(names)),
        bounds=(-0.03, 1.03),
    )


def short(names: Sequence[str]) -> list[str]:
    """Names without the path that they share."""
    heads = {name.rpartition("/")[0] for name in names}
    return [name.rpartition("/")[2] for name in names] if len(heads) == 1 else list(names)


def sensitivities(saved: SavedSearch, prefix: str) -> Chart:
    """How much F and f change with each hyperparameter, across its interval."""
    done = saved.state.done
    with_hypergradient = [t for t in done if t.hypergradient]
    names = tuple(short([p.name for p in saved.parameters]))
    series = []
    if with_hypergradient:
        sizes = [fmean(abs(t.hypergradient[j]) for t in with_hypergradient if t.hypergradient)
                 for j in range(len(names))]  # fmt: skip
        series.append(
            Series("|dF/dx|, hypergradients", "spans", [0.0] * len(names), list(names), length=sizes, colour=0)
        )
    else:
        sizes = [fmean(abs(t.lower_gradient[j]) for t in done if t.lower_gradient) for j in range(len(names))]
        series.append(
            Series("|df/dx|, Danskin gradients", "spans", [0.0] * len(names), list(names), length=sizes, colour=2)
        )
    most = max(range(len(names)), key=lambda j: sizes[j])
    return Chart(
        name=f"{prefix}sensitivities",
        title="Sensitivities",
        caption="Mean size of the gradient over the trainings that have one, per interval of each hyperparameter: "
        "how much the loss would change from bound to bound at that slope.",
        alt=f"The loss is most sensitive to {names[most]}, with {sizes[most]:.3g} per interval.",
        x_label="mean absolute gradient",
        y_label="",
        series=tuple(series),
        lanes=names,
    )


# Multipliers, errors, time and cost.


def multipliers(state: SearchState, prefix: str) -> Chart:
    """Where each augmented Lagrangian descent ended."""
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
        caption="At the end of each upper-level step: the multiplier of f - v_hat <= eps, and how much the constraint "
        "is violated, where it is.",
        alt=f"{len(steps)} steps; the last multiplier is {last.multiplier:.3g}; {len(violated)} steps end with a "
        "violation." if last and last.multiplier is not None else "No step.",
        x_label="upper-level step",
        y_label="multiplier, violation",
        series=tuple(series) if steps else (),
        y_log=all((s.multiplier or 0) > 0 for s in steps),
    )  # fmt: skip


def surrogate_error(state: SearchState, prefix: str) -> Chart:
    """How far the models' predictions were from what was trained."""
    value = [(t.finished, abs(t.proposal.predicted_value - t.lower_loss)) for t in state.done
             if t.proposal.predicted_value is not None]  # fmt: skip
    upper = [(t.finished, abs(t.proposal.predicted_upper_loss - t.upper_loss)) for t in state.done
             if t.proposal.predicted_upper_loss is not None]  # fmt: skip
    series = []
    for number, (name, errors) in enumerate((("|v_hat - v|", value), ("|F_hat - F|", upper))):
        positive = [(i, e) for i, e in errors if e > 0]
        if positive:
            series.append(Series(name, "points", [i for i, _ in positive], [e for _, e in positive], colour=number))
    said = ", ".join(f"{s.name} from {s.y[0]:.2g} to {s.y[-1]:.2g}" for s in series)
    return Chart(
        name=f"{prefix}errors",
        title="Error of the surrogates",
        caption="Distance between the value that a model expected before a training and the one that was trained, in "
        "the order in which trainings ended.",
        alt=f"Errors over the run: {said}.",
        x_label="training, in the order of ends",
        y_label="absolute error",
        series=tuple(series),
        y_log=True,
    )


def timeline(record: Record, prefix: str) -> Chart:
    """When which worker ran which trial, and when upper-level steps were under way."""
    spans: dict[str, list[tuple[str, float, float, str]]] = {}
    workers: dict[tuple[str, int], str] = {}
    for trial in record.get("trials", ()):
        gpus = f", GPU {trial['gpus']}" if trial.get("gpus") else ""
        lane = workers.setdefault((trial["node"], trial["pid"]), f"{trial['node']} worker {len(workers) + 1}{gpus}")
        for begin, end in stretches(trial["seconds"], trial["took"]):
            spans.setdefault(trial["status"], []).append((lane, begin, end - begin, f"trial {trial['trial']}"))
    lanes = list(workers.values())
    for step in record.get("steps", ()):
        if "began" in step:
            spans.setdefault("upper-level step", []).append(
                ("upper level", step["began"], step["ended"] - step["began"], f"step {step['number']}")
            )
    if "upper-level step" in spans:
        lanes.append("upper level")
    colours = {"done": 0, "stopped": 4, "failed": 1, "cut": 3, "upper-level step": 2}
    series = tuple(
        Series(name, "spans", [b for _, b, _, _ in members], [lane for lane, _, _, _ in members],
               length=[length for _, _, length, _ in members], notes=[note for _, _, _, note in members],
               colour=colours.get(name, 7))
        for name, members in spans.items()
    )  # fmt: skip
    return Chart(
        name=f"{prefix}timeline",
        title="Trials over time",
        caption="Each bar is a trial on the worker that ran it; the first epoch includes the start of the worker. "
        "Upper-level steps are shown where their times are known.",
        alt=f"{sum(len(m) for m in spans.values())} bars on {len(lanes)} lanes over {record['seconds']:.0f} seconds.",
        x_label="seconds since the start",
        y_label="",
        series=series,
        lanes=tuple(lanes),
    )


def stretches(seconds: Sequence[float], took: Sequence[float]) -> list[tuple[float, float]]:
    """Epochs that follow each other joined to bars: (begin, end); a pause of more than a second parts them."""
    bars: list[tuple[float, float]] = []
    for end, length in zip(seconds, took, strict=True):
        begin = max(0.0, end - length)
        if bars and begin - bars[-1][1] < 1.0:
            bars[-1] = (bars[-1][0], end)
        else:
            bars.append((begin, end))
    return bars


def cost_split(record: Record, saved: SavedSearch | None, prefix: str) -> Chart:
    """What the cost was made of, in trainings."""
    observed = record["observations"]
    counts = {"trainings": 0.0, "stopped trainings": 0.0, "failed trainings": 0.0}
    epochs = {t["trial"]: len(t["epochs"]) for t in record.get("trials", ())}
    for o in observed:
        status = o.get("status", "done" if o["upper"] is not None else "failed")
        name = {"done": "trainings", "stopped": "stopped trainings"}.get(status, "failed trainings")
        counts[name] += 1.0 if status == "done" else epochs.get(o.get("trial", ""), 0) / record["epochs_per_training"]
    if saved is not None and saved.state.done:
        unit = saved.state.passes_per_training
        counts["upper-level steps"] = sum(step.passes for step in saved.state.steps) / unit
    start, series = 0.0, []
    for number, (name, amount) in enumerate(counts.items()):
        if amount > 0:
            series.append(Series(name, "spans", [start], ["cost"], length=[amount], colour=number))
            start += amount
    return Chart(
        name=f"{prefix}cost",
        title="What it cost",
        caption="In trainings: stopped ones by their epochs, upper-level steps by their gradient evaluations.",
        alt="; ".join(f"{name}: {amount:.1f}" for name, amount in counts.items() if amount > 0) + ", in trainings.",
        x_label="trainings",
        y_label="",
        series=tuple(series),
        lanes=("cost",),
    )


# Tables.


def tables(record: Record) -> list[Table]:
    """The result of a run, and every training that improved on those before it."""
    summary = record.get("summary") or {}
    best = [o for o in record["observations"] if o["upper"] is not None]
    if not best:
        return []
    incumbent = record["observations"][best[-1]["incumbent"]]
    rows = [("F (validation loss)", f"{incumbent['upper']:.6g}")]
    for name, value in incumbent["metrics"].items():
        rows.append((name.replace("_", " "), f"{value:.6g}"))
    for index, metrics in record["refits"].items():
        if int(index) == best[-1]["incumbent"]:
            rows += [(f"{name.replace('_', ' ')} after refit", f"{v:.6g}") for name, v in metrics.items()]
    rows += [("/".join(path), f"{v:.6g}") for path, v in flatten(incumbent["hyperparameters"]).items()]
    rows.append(("cost, in trainings", f"{record['observations'][-1]['cost']:.1f}"))
    if summary.get("verdict"):
        rows.append(("verdict", summary["verdict"]))
    for name, value in (summary.get("diagnostics") or {}).items():
        if isinstance(value, int | float) and math.isfinite(value):
            rows.append((name.replace("_", " "), f"{value:.3g}"))
    improvements = [best[0], *(b for a, b in pairwise(best) if b["incumbent"] != a["incumbent"])]
    steps = tuple(
        (
            str(record["observations"].index(o) + 1),
            f"{o['cost']:.1f}",
            f"{o['upper']:.5g}",
            "-" if o["metrics"].get("test_loss") is None else f"{o['metrics']['test_loss']:.5g}",
        )
        for o in improvements
    )
    return [
        Table("result", "Result", ("what", "value"), tuple(rows), "Of the training with the lowest F."),
        Table("improvements", "Improvements", ("training", "cost", "F", "test loss"), steps),
    ]
