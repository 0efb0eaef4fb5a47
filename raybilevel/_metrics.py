"""Names in the result of a trial: which are raybilevel's, which Ray Tune's, and which the problem's own metrics.

A result is one flat mapping that three parties write to. What a problem's `evaluate` returns under a name of the
others would replace what they report, or be taken for it, so that it is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from raybilevel.errors import ProblemError

UPPER_LOSS = "upper_loss"
LOWER_LOSS = "lower_loss"
EPOCH = "epoch"
STEP = "step"
PASSES = "lower_passes"
FINISHED = "lower_level_finished"
GRADIENT = "lower_gradient"
HYPERPARAMETERS = "hyperparameters"
TRIAL_PATH = "trial_path"
GPUS = "gpus"
PROBLEM = "problem_identity"
CHECKPOINT_DIR_NAME = "checkpoint_dir_name"

OF_DESCENTS = frozenset({
    "hypergradient_norm", "selection_loss", "solver_residual", "solver_iterations", "second_order_products",
    "lower_gradient_norm", "lower_residual",
})  # fmt: skip
"""What a descent along hypergradients reports beside F and f."""

OF_RAYBILEVEL = OF_DESCENTS | {
    UPPER_LOSS, LOWER_LOSS, EPOCH, STEP, PASSES, FINISHED, GRADIENT, HYPERPARAMETERS, TRIAL_PATH, GPUS, PROBLEM,
}  # fmt: skip

# Of Ray 2.50 to 2.60: AUTO_RESULT_KEYS, DEBUG_METRICS and the auto-filled keys in ray/tune/result.py, Tune's private
# keys, and what the scheduler of BOHB adds.
OF_TUNE = frozenset({
    "training_iteration", "iterations_since_restore", "time_this_iter_s", "time_total_s", "time_since_restore",
    "timesteps_this_iter", "timesteps_total", "timesteps_since_restore", "episodes_this_iter", "episodes_total",
    "timestamp", "date", "pid", "hostname", "node_ip", "trial_id", "experiment_id", "experiment_tag", "trainable_name",
    "config", "done", "should_checkpoint", CHECKPOINT_DIR_NAME, "hyperband_info", "_metric", "__duplicate__",
})  # fmt: skip

RESERVED = OF_RAYBILEVEL | OF_TUNE


def is_reserved(name: str) -> bool:
    """Whether a metric cannot be the problem's own. Tune joins nested names by slashes: "config/lr" is of "config"."""
    return name.partition("/")[0] in RESERVED


def check_metrics(problem: str, returned: object) -> dict[str, float]:
    """What a problem's `evaluate` returned, as plain numbers.

    problem: the name of its class.

    Raises:
        ProblemError: it is not a mapping of names to numbers, or a name is taken; it is named.
    """
    where = f"{problem}.evaluate"
    if not isinstance(returned, Mapping):
        raise ProblemError(f"{where} must return a dict of names to numbers, got {type(returned).__name__}")
    found = {}
    for name, value in returned.items():
        if not isinstance(name, str):
            raise ProblemError(f"{where}: the names of metrics must be strings, got {name!r}")
        if is_reserved(name):
            whose = "raybilevel reports" if name.partition("/")[0] in OF_RAYBILEVEL else "Ray Tune adds"
            raise ProblemError(
                f"{where} returns {name!r}, which {whose} under that name itself; rename the metric, e.g. to "
                f"'my_{name.replace('/', '_')}'"
            )
        try:
            found[name] = float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ProblemError(f"{where}: the metric {name!r} must be a number, got {value!r}") from error
    return found


def problem_metrics(result: Mapping[str, Any]) -> dict[str, float]:
    """The problem's own metrics in a trial's result: finite numbers that neither raybilevel nor Tune has added."""
    return {
        name: float(value)
        for name, value in result.items()
        # A truth value is an int, too.
        if isinstance(value, float | int) and not isinstance(value, bool)
        if not is_reserved(name) and math.isfinite(value)
    }
