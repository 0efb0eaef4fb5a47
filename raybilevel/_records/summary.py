"""The result of a run in the form of `summary.json`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from raybilevel._lower.paired import Gains
from raybilevel._metrics import HYPERPARAMETERS, UPPER_LOSS, problem_metrics
from raybilevel._models.constraints import judged
from raybilevel._models.for_refit import ForRefit
from raybilevel._models.pareto import front
from raybilevel._objectives import read_others
from raybilevel._records.conclusion import conclude
from raybilevel._records.run_folder import config_of, finite
from raybilevel._records.shared_value import best_shared
from raybilevel._records.versions import versions
from raybilevel.methods._base import Method
from raybilevel.search._diagnostics import diagnose, verdict
from raybilevel.search._new_data import new_data
from raybilevel.search_state import SearchState, Training
from raybilevel.space import Space


def summary_of(
    state: SearchState,
    space: Space,
    method: Method,
    trial_results: Mapping[int, Mapping[str, Any]],
    checkpoints: Mapping[int, str],
    about: Mapping[str, Any],
    test_loss_refit: float | None,
    wall_seconds: float,
    gains: Gains | None = None,
    for_refit: ForRefit | None = None,
) -> dict[str, Any]:
    """The content of `summary.json`.

    Its `best` is the training expected to be best on new data, `lowest` the one with the lowest F, `start` the first
    that ran to its end, and `shared` the best of those with one value for all hyperparameters of a kind.

    trial_results: what each training last reported, by its index.
    about:         problem, method and seed, of a search of another metric than F, metric and mode, and of other
        metrics, by their names, bounds as constraints and modes as other_objectives.
    gains:         of the result over the start and over the best shared value, by single examples.
    for_refit:     what was chosen for the refit; None where that was not asked.
    """
    best, lowest = method.incumbent(state), state.best
    start, gains = state.start, gains or Gains()
    shared = best_shared(state, space) if method.descent is None else None
    expected, by_model = new_data(state, best), state.expected
    about = {"metric": UPPER_LOSS, "mode": "min", "constraints": {}, "other_objectives": {}, **about}
    # The search minimises, so its F is the metric with the sign turned where that is maximised.
    sign = -1.0 if about["mode"] == "max" else 1.0
    others = read_others(about["other_objectives"])
    test_losses = {index: r["test_loss"] for index, r in trial_results.items() if "test_loss" in r}

    def result(training: Training) -> dict[str, Any]:
        return {
            "training": state.number(training),
            "hyperparameters": found(trial_results, training) or config_of(space, training),
            "upper_loss": sign * training.upper_loss,
            "expected_upper_loss": sign * by_model[training.index] if training.index in by_model else None,
            "test_loss": test_losses.get(training.index),
            "feasible": training.feasible,
        }

    def of_front(training: Training) -> dict[str, Any]:
        beside = zip(others, training.others, strict=True)
        objectives = {other.metric: other.minimised(value) for other, value in beside}
        return {**result(training), "other_objectives": objectives, "checkpoint": checkpoints.get(training.index)}

    summary = {
        **about,
        "versions": versions(),
        "best": None
        if best is None
        else {
            **result(best),
            "lower_loss": finite(best.lower_loss),
            "test_loss_refit": test_loss_refit,
            "checkpoint": checkpoints.get(best.index),
        },
        "lowest": None if lowest is None else {**result(lowest), "checkpoint": checkpoints.get(lowest.index)},
        "pareto_front": [of_front(training) for training in front(state)] if others else [],
        "start": None if start is None else result(start),
        "gain": None if gains.start is None else asdict(gains.start),
        "shared": None if shared is None else {**result(shared.training), "tried": shared.tried},
        "gain_over_shared": None if gains.shared is None else asdict(gains.shared),
        "new_data": None if expected is None else asdict(expected),
        "refit": None if for_refit is None or not for_refit.trainings else of_refit(for_refit, space),
        "metrics": {} if best is None else problem_metrics(trial_results.get(best.index, {})),
        "trainings": len(state.told),
        "failed_trainings": sum(t.status == "failed" for t in state.told),
        "upper_steps": len(state.steps),
        "failed_upper_steps": sum(step.failed for step in state.steps),
        "cost": state.cost,
        "wall_seconds": wall_seconds,
        # The verdict is on F with the penalty. `converged` is given plain F, as it applies the penalty itself.
        "verdict": verdict(judged(state), method.converged(state), test_losses, test_loss_refit),
        "diagnostics": asdict(diagnose(state)),
        "history": history(state, space, test_losses, trial_results, sign),
    }
    return {**summary, "in_words": list(conclude(summary).lines)}


def of_refit(chosen: ForRefit, space: Space) -> dict[str, Any]:
    return {
        "hyperparameters": space.part(chosen.config),
        "spread": chosen.spread,
        "gain": None if chosen.gain is None else asdict(chosen.gain),
        "trainings": chosen.trainings,
    }


def found(trial_results: Mapping[int, Mapping[str, Any]], training: Training) -> Mapping[str, Any] | None:
    """The final hyperparameters of a descent; None for a training, which keeps those of its config."""
    return trial_results.get(training.index, {}).get(HYPERPARAMETERS)


def history(
    state: SearchState,
    space: Space,
    test_losses: Mapping[int, float],
    trial_results: Mapping[int, Mapping[str, Any]] | None = None,
    sign: float = 1.0,
) -> list[dict[str, Any]]:
    """One entry per ended training, in the order of their ends. The losses of a failed training are None.

    sign: of the metric that is searched, -1 if it is maximised.
    """
    entries, best = [], (math.inf, math.inf)
    for training, cost in zip(state.told, state.costs(), strict=True):
        if training.status == "done":
            best = min(best, training.rank)
        entries.append(
            {
                "training": state.number(training),
                "status": training.status,
                "cost": cost,
                "hyperparameters": found(trial_results or {}, training) or config_of(space, training),
                "lower_loss": finite(training.lower_loss),
                "upper_loss": finite(sign * training.upper_loss),
                "best_upper_loss": finite(sign * best[1]),
                "test_loss": test_losses.get(training.index),
                "feasible": training.feasible if training.status in ("done", "stopped") else None,
            }
        )
    return entries


def as_text(summary: Mapping[str, Any]) -> str:
    return json.dumps(summary, indent=2, allow_nan=False) + "\n"  # NaN is no JSON: other programs refuse it
