"""What a search says of itself: how good its models were, and a verdict a user can act on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from statistics import median
from typing import Literal

from raybilevel._models.trust import Promise, promises
from raybilevel.search_state import SearchState, StepRecord, Training, or_zero

Verdict = Literal[
    "converged", "budget exhausted", "surrogate too poor", "validation set overfitted", "not feasible", "no result"
]
ENOUGH_STEPS = 3
"""Before anything is said of hypergradients."""
NEWEST = 5
"""Predictions of F whose median error counts."""
RISE = 0.1
"""Of a test loss, in units of the spread of F; less is noise."""


@dataclass(frozen=True)
class Newest:
    """Of the newest training and step.

    value_error: |v_hat - v| at the newest point that v_hat had predicted; None of a method without v_hat.
    multiplier:  of the last augmented Lagrangian.
    violation:   of its constraint; None of a method without v_hat.
    """

    value_error: float | None
    multiplier: float | None
    violation: float | None


@dataclass(frozen=True)
class Diagnostics(Newest):
    """Of the whole search as well.

    expected_upper_loss: F by the model of F at the training with the lowest F seen; above that where values are noisy.
    typical_value_error: the median of all such errors.
    hypergradient_norm:  at the training whose hypergradient is newest.
    hypergradient_steps: steps within trust regions that have a hypergradient at both ends.
    hypergradient_direction: quadrant correlation (Blomqvist 1950) of the changes of F that hypergradients promised on
        these steps with those that were trained: 1 where F always went the promised way, -1 where it never did.
    hypergradient_length: the median of trained over promised changes, without their signs: 1 where hypergradients have
        the right length, 2 where they are half as long as they should be. Both None with fewer than three steps.
    """

    expected_upper_loss: float | None
    typical_value_error: float | None
    hypergradient_norm: float | None
    hypergradient_steps: int
    hypergradient_direction: float | None
    hypergradient_length: float | None


def newest(state: SearchState) -> Newest:
    """Without a look at every training, of which there may be thousands."""
    errors = (value_error(training) for training in reversed(state.done))
    last = newest_descent(state)
    return Newest(
        value_error=next((error for error in errors if error is not None), None),
        multiplier=last.multiplier if last else None,
        violation=last.violation if last else None,
    )


def diagnose(state: SearchState) -> Diagnostics:
    errors = [error for training in state.done if (error := value_error(training)) is not None]
    known = next((training for training in reversed(state.done) if training.hypergradient), None)
    kept = promises(state)
    enough = len(kept) >= ENOUGH_STEPS
    return Diagnostics(
        **asdict(newest(state)),
        expected_upper_loss=None if state.best is None else state.expected.get(state.best.index),
        typical_value_error=median(errors) if errors else None,
        hypergradient_norm=math.hypot(*map(or_zero, known.hypergradient)) if known and known.hypergradient else None,
        hypergradient_steps=len(kept),
        hypergradient_direction=direction(kept) if enough else None,
        hypergradient_length=length(kept) if enough else None,
    )


def direction(known: tuple[Promise, ...]) -> float:
    """1 where F always went the promised way, -1 where it never did."""
    signs = (promise.promised * promise.seen for promise in known)
    return sum((sign > 0) - (sign < 0) for sign in signs) / len(known)


def length(known: tuple[Promise, ...]) -> float:
    """The median of trained over promised changes of F, without their signs."""
    return median(abs(promise.kept) for promise in known)


def value_error(training: Training) -> float | None:
    predicted = training.proposal.predicted_value
    return None if predicted is None else abs(predicted - training.lower_loss)


def newest_descent(state: SearchState) -> StepRecord | None:
    return next((step for step in reversed(state.steps) if step.multiplier is not None), None)


def verdict(
    state: SearchState, converged: bool, test_losses: Mapping[int, float], refit_loss: float | None = None
) -> Verdict:
    """What to make of the result.

    converged:   whether the method had nothing better to propose.
    test_losses: test loss of each training, by index, where there is one.
    refit_loss:  test loss of a refit at the result's hyperparameters, if there is one.
    """
    if state.best is None:
        return "no result"
    if not state.best.feasible:
        return "not feasible"
    if overfitted(state, test_losses, refit_loss):
        return "validation set overfitted"
    # First: a search that has nothing better to propose is not misled by its last predictions.
    if converged:
        return "converged"
    return "surrogate too poor" if misled(state) else "budget exhausted"


def misled(state: SearchState) -> bool:
    """Whether the model of F predicts the next points of trust regions no better than any trained point would: points
    of the whole box are far from the data, and are trained because little is known there."""
    missed = [
        abs(t.proposal.predicted_upper_loss - t.upper_loss)
        for t in state.done
        if t.proposal.region is not None and t.proposal.predicted_upper_loss is not None
    ]
    return len(missed) >= NEWEST and 0 < state.spread < median(missed[-NEWEST:])


def overfitted(state: SearchState, test_losses: Mapping[int, float], refit_loss: float | None = None) -> bool:
    """F fell while the test loss rose: that of the incumbent, or of its refit, which has seen more data, is worse than
    that of an earlier incumbent, by more than half of what F has gained since, and a tenth of the spread of F: neither
    depends on a constant in the loss, or on its unit."""
    incumbents: list[Training] = []
    for training in state.done:
        if not training.feasible:
            continue
        if training.index in test_losses and (not incumbents or training.upper_loss < incumbents[-1].upper_loss):
            incumbents.append(training)
    if not incumbents:
        return False
    *before, last = incumbents
    reached = [test_losses[last.index]] + ([] if refit_loss is None else [refit_loss])
    return any(
        loss - test_losses[earlier.index] > max(RISE * state.spread, 0.5 * (earlier.upper_loss - last.upper_loss))
        for earlier in before
        for loss in reached
    )
