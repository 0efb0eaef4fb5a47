"""The steps of a training, tried on its first and its last batch; and what is asked of the trained model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from raybilevel._lower import checkpoint
from raybilevel._lower.passes import Passes
from raybilevel._lower.training import train_epoch
from raybilevel.errors import CheckpointError, NotFiniteError, ProblemError
from raybilevel.problem import Batch, BilevelProblem, evaluate, make_refit_batches, move
from raybilevel.search._calls import Given, calling
from raybilevel.search._fresh import changes, copies, listed
from raybilevel.search._repeatable import Look, look_at
from raybilevel.search._same_again import look_at_shuffled, warn_of_other_steps


def rehearse(
    problem: BilevelProblem,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    given: Given,
    config: Mapping[str, Any],
) -> None:
    """Call everything that a training calls: a step in train mode on the first and on the last batch, a
    checkpoint, `evaluate`, and the loss on a batch for the refit. What is not the same again is warned of.

    config: the hyperparameters as plain values; in `given` they are tensors.

    Raises:
        ProblemError: something of it fails.
    """
    for group in optimizer.param_groups:
        if "max_iter" in group:  # L-BFGS: one iteration is enough here
            group.update(max_iter=1, max_eval=2)
    seen = look_at_shuffled(problem, config)

    def loss_of(model: nn.Module, batch: Batch) -> Tensor:
        return problem.lower_loss(model, given, batch)

    def loss(batch: Batch) -> Tensor:
        return loss_of(model, batch)

    diverges = False
    for raw in (seen.first, seen.last):
        with calling(problem, f"lower_loss, in train mode on a batch of {problem.batch_size(raw)},"):
            try:
                train_epoch(problem, model, optimizer, [raw], loss, Passes(), "at the centre of the space")
            except NotFiniteError:  # at this x; a training that diverges counts as failed
                diverges = True
                break
    try:
        # After a step, as an optimizer has no state before.
        saved = checkpoint.dump({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    except CheckpointError as error:
        raise ProblemError(f"{type(problem).__name__}: {error}") from error
    if not diverges:
        warn_of_other_steps(problem, model, optimizer, saved, loss_of, seen.first, config)
    check_evaluate(problem, model, given)
    if (refit := refit_look(problem, config)) is not None:
        model.train()
        with calling(problem, "lower_loss, on the data of refit_batches,"):
            problem.lower_loss(model, given, move(refit.first, problem.device, problem.dtype))


def check_evaluate(problem: BilevelProblem, model: nn.Module, given: Given) -> None:
    """Call the problem's `evaluate`.

    Raises:
        ProblemError: it fails, changes the model, or returns something else than numbers under names that are free.
    """
    model.eval()
    before = copies(model)
    with torch.no_grad(), calling(problem, "evaluate"):
        evaluate(problem, model, given)
    if changed := changes(model, before):
        raise ProblemError(
            f"{type(problem).__name__}.evaluate changes the model ({listed(changed)}), which is trained on after it; "
            "change a copy, e.g. copy.deepcopy(model)"
        )


def refit_look(problem: BilevelProblem, config: Mapping[str, Any]) -> Look | None:
    """At the data of a refit; None where there are none."""
    with calling(problem, "refit_batches(generator)"):
        batches: Any = make_refit_batches(problem, torch.Generator().manual_seed(0), config)
    return None if batches is None else look_at(batches, "refit_batches(generator)", problem)
