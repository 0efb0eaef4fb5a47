"""Whether the settings of a problem are among those that there are."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

import torch

from raybilevel._metrics import UPPER_LOSS, is_reserved
from raybilevel.errors import ProblemError
from raybilevel.problem import BilevelProblem

COUNTS = ("epochs", "evaluate_every", "accumulate")
CHOICES = {
    "schedule_interval": ("epoch", "step"),
    "upper_likelihood": ("auto", "log_likelihood", "squared_error", "none"),
    "optimistic": (False, True),
    "own_loop": (False, True),
}


def check_settings(problem: BilevelProblem) -> None:
    """Refuse a problem with a setting that is out of range.

    Raises:
        ProblemError: one is; it is named.
    """
    name = type(problem).__name__
    for setting in COUNTS:
        if not is_count(count := getattr(problem, setting)):
            raise ProblemError(f"{name}.{setting} must be a whole number of at least 1, got {count!r}")
    if problem.patience is not None and not is_count(problem.patience):
        raise ProblemError(f"{name}.patience must be a whole number of at least 1 or None, got {problem.patience!r}")
    if problem.clip is not None and not is_between(problem.clip, 0, math.inf):
        raise ProblemError(f"{name}.clip must be a positive norm of the gradient or None, got {problem.clip!r}")
    if problem.ema is not None and not is_between(problem.ema, 0, 1):
        raise ProblemError(f"{name}.ema must be a decay between 0 and 1 or None, got {problem.ema!r}")
    for setting, choices in CHOICES.items():
        # By type as well, as 1 == True.
        if not any(type(given := getattr(problem, setting)) is type(choice) and given == choice for choice in choices):
            listed = ", ".join(map(repr, choices[:-1])) + f" or {choices[-1]!r}"
            raise ProblemError(f"{name}.{setting} must be {listed}, got {given!r}")
    metric = problem.upper_metric
    if not isinstance(metric, str) or not metric or (metric != UPPER_LOSS and is_reserved(metric)):
        raise ProblemError(f"{name}.upper_metric must be a name that is not taken, e.g. 'val_loss', got {metric!r}")
    if not isinstance(problem.dtype, torch.dtype) or not problem.dtype.is_floating_point:
        raise ProblemError(
            f"{name}.dtype must be a floating-point type of torch, e.g. torch.float32, got {problem.dtype!r}"
        )
    if problem.autocast not in (None, torch.bfloat16, torch.float16):
        raise ProblemError(f"{name}.autocast must be torch.bfloat16, torch.float16 or None, got {problem.autocast!r}")
    if problem.autocast is not None and problem.dtype != torch.float32:
        raise ProblemError(
            f"{name}.autocast needs weights in torch.float32, and {name}.dtype is {problem.dtype!r}; leave out one"
        )


def is_count(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


def is_between(value: Any, low: float, high: float) -> bool:
    """Whether it is a number strictly between the two; infinity is below infinity."""
    return (
        isinstance(value, Real)
        and not isinstance(value, bool)
        and low < float(value)
        and (float(value) < high or value == high == math.inf)
    )
