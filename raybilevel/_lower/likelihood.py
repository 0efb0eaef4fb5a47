"""What kind of loss F is, and of how many examples: what a search must know to tell chance from gain."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raybilevel.errors import ProblemError
from raybilevel.problem import (
    BilevelProblem,
    Hyperparameters,
    SupportsRepeats,
    make_batches,
    make_model,
    move,
    on_cpu,
    upper_loss,
)
from raybilevel.search_state import Likelihood

KINDS = ("auto", "log_likelihood", "squared_error", "none")
MEAN = 1  # torch's number of the reduction
LOG_LIKELIHOODS = ("NllLossBackward", "BinaryCrossEntropyBackward", "BinaryCrossEntropyWithLogitsBackward")


@dataclass(frozen=True)
class UpperLikelihood:
    """kind: None where F is not known to be a likelihood. examples: n, each counted once."""

    kind: Likelihood | None
    examples: int


_KNOWN: dict[int, UpperLikelihood] = {}
"""By the problem's id, as a data class has no hash."""


def upper_likelihood(
    problem: BilevelProblem, hyperparameters: Hyperparameters, config: Mapping[str, Any] | None = None
) -> UpperLikelihood:
    """Of a problem, looked up once in a process.

    config: the hyperparameters as plain values, of which a model and batches are made.

    Raises:
        ProblemError: `upper_likelihood` has a value that is not known.
    """
    if id(problem) not in _KNOWN:
        sizes = [problem.batch_size(batch) for batch in make_batches(problem, "upper", None, config or {})]
        repeats = problem.upper_repeats if isinstance(problem, SupportsRepeats) else 1.0
        kind = _kind(problem, hyperparameters, config or {})
        _KNOWN[id(problem)] = UpperLikelihood(kind, round(sum(sizes) / repeats))
        weakref.finalize(problem, _KNOWN.pop, id(problem), None)
    return _KNOWN[id(problem)]


def _kind(problem: BilevelProblem, hyperparameters: Hyperparameters, config: Mapping[str, Any]) -> Likelihood | None:
    said = problem.upper_likelihood
    if said not in KINDS:
        name = type(problem).__name__
        raise ProblemError(f"{name}.upper_likelihood must be one of {', '.join(KINDS)}, got {said!r}")
    if said == "none" or problem.optimistic:  # weights that have seen the examples make F lower still
        return None
    if said != "auto":
        return said
    # No device is forked: the model is made on the CPU, and draws its numbers there.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make_model(on_cpu(problem), config).eval()
        # One batch will do: it is not the value that is looked at, but the function that returned it.
        batch = move(next(iter(make_batches(problem, "upper", None, config))), "cpu", problem.dtype)
        loss = upper_loss(problem, model, hyperparameters, batch)
    return kind_of(loss, problem.batch_size(batch))


def kind_of(loss: Tensor, examples: int) -> Likelihood | None:
    """By the torch function that a loss is the direct result of, if it took the plain mean of one term an example."""
    # Autograd keeps a function's arguments in its node as `_saved_*`. Nodes of other functions lack these.
    made_by: Any = loss.grad_fn
    saved = {name: getattr(made_by, f"_saved_{name}", None) for name in ("reduction", "target", "weight", "pos_weight")}
    if saved["reduction"] != MEAN or saved["weight"] is not None or saved["pos_weight"] is not None:
        return None
    # Of several targets an example, e.g. one a pixel, the mean is not over n independent terms.
    if saved["target"] is None or saved["target"].numel() != examples:
        return None
    name = made_by.name()
    if name.startswith("MseLossBackward"):
        return "squared_error"
    return "log_likelihood" if name.startswith(LOG_LIKELIHOODS) else None
