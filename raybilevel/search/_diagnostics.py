"""What a search says of itself: how good its models were, and a verdict a user can act on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from statistics import median
from typing import Literal

from raybilevel.search_state import SearchState, StepRecord, Training, or_zero

Verdict = Literal["converged", "budget exhausted", "surrogate too poor", "validation set overfitted", "no result"]


@dataclass(frozen=True)
class Newest:
    """Of the newest training and step.

    value_error:           |v_hat - v| at the newest point that v_hat had predicted.
    multiplier, violation: where the last augmented Lagrangian descent ended.
    """

    value_error: float | None
    multiplier: float | None
    violation: float | None


@dataclass(frozen=True)
class Diagnostics(Newest):
    """Of the whole search as well.

    typical_value_error: the median.
    hypergradient_norm:  at the training whose hypergradient is newest.
    agreement:           correlation between the changes of F that hypergradients promised to first order and those that
        were trained, over steps within a trust region; 1 is perfect, None with fewer than three.
    """

    typical_value_error: float | None
    hypergradient_norm: float | None
    agreement: float | None


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
    return Diagnostics(
        **asdict(newest(state)),
        typical_value_error=median(errors) if errors else None,
        hypergradient_norm=math.hypot(*map(or_zero, known.hypergradient)) if known and known.hypergradient else None,
        agreement=agreement(state),
    )


def value_error(training: Training) -> float | None:
    predicted = training.proposal.predicted_value
    return None if predicted is None else abs(predicted - training.lower_loss)


def newest_descent(state: SearchState) -> StepRecord | None:
    return next((step for step in reversed(state.steps) if step.multiplier is not None), None)


def agreement(state: SearchState) -> float | None:
    """Correlation through the origin of promised and trained changes of F, each relative to the step it belongs to."""
    promised, trained = [], []
    for start, end in neighbours(state):
        if not start.hypergradient:
            continue
        step = [b - a for a, b in zip(start.unit, end.unit, strict=True)]
        length = math.hypot(*step)
        if length > 0:
            promised.append(sum(or_zero(g) * s for g, s in zip(start.hypergradient, step, strict=True)) / length)
            trained.append((end.upper_loss - start.upper_loss) / length)
    if len(promised) < 3:
        return None
    # Means are not taken off: promises that all have the wrong sign must not count as right.
    norms = math.hypot(*promised) * math.hypot(*trained)
    return sum(a * b for a, b in zip(promised, trained, strict=True)) / norms if norms > 0 else None


def neighbours(state: SearchState) -> list[tuple[Training, Training]]:
    """Each training of a trust region with the best one of that region before it."""
    pairs: list[tuple[Training, Training]] = []
    best: dict[int, Training] = {}
    for training in state.done:
        region = training.proposal.region
        if region is None:
            continue
        centre = best.get(region, state.trainings[region])
        if centre.index != training.index and centre.status == "done":
            pairs.append((centre, training))
        best[region] = min(centre, training, key=lambda t: t.upper_loss)
    return pairs


def verdict(state: SearchState, converged: bool, test_losses: Mapping[int, float]) -> Verdict:
    """What to make of the result.

    converged:   whether the method had nothing better to propose.
    test_losses: test loss of each training, by index, where there is one.
    """
    best = state.best
    if best is None:
        return "no result"
    if overfitted(state, test_losses):
        return "validation set overfitted"
    missed = [
        abs(t.proposal.predicted_upper_loss - t.upper_loss)
        for t in state.done
        if t.proposal.predicted_upper_loss is not None
    ]
    spread = median([abs(t.upper_loss - best.upper_loss) for t in state.done])
    if len(missed) >= 5 and spread > 0 and median(missed[-5:]) > spread:
        return "surrogate too poor"
    return "converged" if converged else "budget exhausted"


def overfitted(state: SearchState, test_losses: Mapping[int, float]) -> bool:
    """F fell while the test loss rose: the incumbent's test loss is worse than that of an earlier incumbent, by more
    than a hundredth of itself and more than half of what F has gained since then."""
    incumbents: list[Training] = []
    for training in state.done:
        if training.index in test_losses and (not incumbents or training.upper_loss < incumbents[-1].upper_loss):
            incumbents.append(training)
    if len(incumbents) < 2:
        return False
    last = incumbents[-1]
    for earlier in incumbents[:-1]:
        risen = test_losses[last.index] - test_losses[earlier.index]
        if risen > max(0.01 * abs(test_losses[last.index]), 0.5 * (earlier.upper_loss - last.upper_loss)):
            return True
    return False
