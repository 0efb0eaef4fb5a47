"""The one call at the end of a Tune function whose loop is the user's own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ray import tune
from torch import Tensor, nn

from raybilevel._lower.own_loop import OwnTraining, check_times
from raybilevel._lower.training import CHECKPOINT_FILE
from raybilevel.errors import ConfigError, ProblemError
from raybilevel.problem import BilevelProblem
from raybilevel.tune._trainable import concluded, send


def conclude(
    problem: BilevelProblem,
    model: nn.Module,
    config: Mapping[str, Any],
    passes: float | None = None,
    metrics: Mapping[str, Any] | None = None,
    checkpoint: tune.Checkpoint | None = None,
    trained_time: Mapping[str, Tensor] | None = None,
) -> None:
    """Report a model that your own loop has trained, with all that `BilevelSearch` needs. Call it last in a Tune
    function, once:

        def trainable(config):
            model = ...  # your loop, with tune.report({"upper_loss": ...}) as often as you like
            raybilevel.conclude(problem, model, config)

    It reports `lower_loss` (f), `upper_loss` (F), what the problem's `evaluate` returns and `lower_gradient` (df/dx) at
    the model's weights, `lower_level_finished=True`, and a checkpoint from which upper-level steps take the weights.
    The problem's `model` must make of the config the model that was trained; its `optimizer` and `epochs` are not used,
    except for the cost.

    passes:     what the loop cost, in passes over the training data with gradients; by default the problem's `epochs`.
        Upper-level steps may spend a share of it.
    metrics:    to be reported, too.
    checkpoint: one of your own, whose files are kept beside ours.
    trained_time: for how long each tensor of weights was trained, as a problem's `train` reports it. Hypergradients of
        short training runs go by it. Without it they are those at a minimum of f.

    Raises:
        ProblemError: `problem` is no `BilevelProblem` instance, is `optimistic`, or makes another model; or a tensor of
            weights has no time, or one of another shape.
        ConfigError: `passes` is not a positive number.
        NotFiniteError: f or F is NaN or infinite: the trial fails, and the search goes on without it. An entry of df/dx
            that is not finite is left out, and the trial counts.
    """
    if not isinstance(problem, BilevelProblem):
        raise ProblemError(f"conclude: expected a BilevelProblem instance, got {problem!r}")
    if passes is not None and not (math.isfinite(passes) and passes > 0):
        raise ConfigError(f"passes must be a positive number of passes over the training data, got {passes}")
    training = OwnTraining(problem, config, model, float(problem.epochs) if passes is None else passes)
    if trained_time is not None:
        check_times(type(problem).__name__, trained_time, training.levels.model)
        training.time = trained_time
    # Ours last, so that no metric of the user's replaces F or f.
    send({**(metrics or {}), **concluded(training)}, CHECKPOINT_FILE, training.dump(), checkpoint)
