"""Losses of single examples with two sets of weights: how much lower they are with the second, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy, binary_cross_entropy_with_logits

from raybilevel._lower.functions import Part
from raybilevel._lower.levels import Levels
from raybilevel._lower.likelihood import kind_of
from raybilevel._lower.observed import Observed
from raybilevel.problem import BilevelProblem, SupportsRepeats, losses_on_test, make_model

Metric = Literal["test_loss", "upper_loss"]
SAME_MEAN = 1e-4
"""Relative difference up to which the mean over examples is F; F may be in float32."""


@dataclass(frozen=True)
class Gain:
    """The mean over examples of how much lower the loss of each is than with other weights.

    of:             "test_loss", or "upper_loss", which is F.
    standard_error: of the mean, by the differences of the same examples; without the chance of a choice by F.
    """

    of: Metric
    mean: float
    standard_error: float
    examples: int


@dataclass(frozen=True)
class Weights:
    """The config of a training run, plain values, and the state of its model, by name."""

    config: Mapping[str, Any]
    model: Mapping[str, Any]


@dataclass(frozen=True)
class Gains:
    """Of the result of a search; None where it is not known.

    start:  over the start.
    shared: over the best training with one value for all hyperparameters of a kind.
    """

    start: Gain | None = None
    shared: Gain | None = None


def paired_gains(problem: BilevelProblem, before: Mapping[int, Weights], result: Weights) -> dict[int, Gain | None]:
    """From other weights to the result, over test examples if the problem has their losses, else over validation
    examples.

    Returns:
        By the keys of `before`, which are the trainings; None if the losses of single examples are not known, or of
        fewer than two.
    """
    after = restored(problem, result)
    test, upper = test_losses(after), upper_losses(after)
    found = {}
    for key, weights in before.items():
        one = restored(problem, weights)
        found[key] = difference("test_loss", test_losses(one), test) or difference(
            "upper_loss", upper_losses(one), upper
        )
    return found


def difference(of: Metric, before: Tensor | None, after: Tensor | None) -> Gain | None:
    """Between the losses of the same examples, both of shape (n,)."""
    if before is None or after is None or before.shape != after.shape or len(before) < 2:
        return None
    lower = before - after
    error = lower.std().item() / math.sqrt(len(lower))
    return Gain(of, lower.mean().item(), error, len(lower)) if math.isfinite(error) else None


def restored(problem: BilevelProblem, weights: Weights) -> Observed:
    """A training run at the weights with which it ended."""
    observed = Observed(problem, weights.config)
    model = make_model(problem, observed.config)
    model.load_state_dict(dict(weights.model))
    observed.levels = Levels(problem, model, observed.variables, observed.config)
    return observed


def test_losses(observed: Observed) -> Tensor | None:
    """Shape (n,), in double precision on the CPU."""
    observed.levels.model.eval()
    with torch.no_grad():
        found = losses_on_test(observed.problem, observed.levels.model, observed.hyperparameters)
    return None if found is None else found.to("cpu", torch.double)


def upper_losses(observed: Observed) -> Tensor | None:
    """The losses of which F is the mean, shape (n,), in double precision on the CPU.

    Returns:
        None if F is no plain mean of one loss an example by a torch function that keeps its arguments for autograd, if
            it draws random numbers, or if it has each example several times.
    """
    problem = observed.problem
    if isinstance(problem, SupportsRepeats) and problem.upper_repeats != 1:
        return None
    found: list[Tensor | None] = []

    def take(part: Part) -> None:
        found.append(terms_of(part.loss, int(part.examples)))

    # With a gradient, as autograd keeps arguments for it only.
    observed.levels.visit("upper", observed.variables.x, observed.levels.y.detach().requires_grad_(), take)
    known = [terms for terms in found if terms is not None]
    return torch.cat(known) if len(known) == len(found) and observed.levels.draws("upper") == 1 else None


def terms_of(loss: Tensor, examples: int) -> Tensor | None:
    """What a loss of shape () is the mean of, one number an example, if torch kept the arguments of its function."""
    if kind_of(loss, examples) is None:
        return None
    made_by: Any = loss.grad_fn
    name, inputs, target = made_by.name(), made_by._saved_self.detach(), made_by._saved_target
    if name.startswith("MseLossBackward"):
        terms = (inputs - target).square()
    elif name.startswith("BinaryCrossEntropyWithLogitsBackward"):
        terms = binary_cross_entropy_with_logits(inputs, target, reduction="none")
    elif name.startswith("BinaryCrossEntropyBackward"):
        terms = binary_cross_entropy(inputs, target, reduction="none")
    else:
        # Log-probabilities, (n, classes). A label that is ignored is negative, and has no term.
        terms = -inputs.gather(-1, target.clamp_min(0).unsqueeze(-1))
    terms = terms.flatten().to("cpu", torch.double)
    return terms if math.isclose(terms.mean().item(), loss.item(), rel_tol=SAME_MEAN, abs_tol=SAME_MEAN) else None
