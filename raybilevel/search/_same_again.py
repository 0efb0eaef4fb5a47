"""Whether a training is the same again under the same seed, and goes on the same from a checkpoint."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from raybilevel._lower.passes import Passes
from raybilevel._lower.random_numbers import common_random
from raybilevel._lower.training import train_epoch
from raybilevel.errors import NotFiniteError
from raybilevel.problem import Batch, BilevelProblem, make_batches, move
from raybilevel.search._calls import calling
from raybilevel.search._fresh import model_of_a_training, optimizer_of_a_training
from raybilevel.search._measured import agree, as_vector, trained
from raybilevel.search._repeatable import Look, look_at

logger = logging.getLogger(__name__)

OTHER_STEP = 1e-3
"""Of a step, more than rounding makes it differ."""

LossOf = Callable[[nn.Module, Batch], Tensor]
"""f of a model on a batch that is on the device."""


def look_at_shuffled(problem: BilevelProblem, config: Mapping[str, Any]) -> Look:
    """A look at the lower level's data as a training has them, with a warning if a second one differs.

    Raises:
        ProblemError: there is none, or it is no data.
    """
    what = "batches('lower', generator)"

    def look(most: int | None = None) -> Look:
        with common_random(problem.device, seed=0), calling(problem, what):
            return look_at(
                make_batches(problem, "lower", torch.Generator().manual_seed(0), config), what, problem, most
            )

    one = look()
    # By count: the clock would end the two passes at different batches.
    if one.digest != look(one.count).digest:
        logger.warning(
            "%s.%s yields other data, or in another order, under the same seed, so that trainings with the same "
            "hyperparameters end at another F; shuffle and augment by the generator, or by torch's random numbers",
            type(problem).__name__, what,
        )  # fmt: skip
    return one


def warn_of_other_steps(
    problem: BilevelProblem,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    saved: bytes,
    loss_of: LossOf,
    raw: Batch,
    config: Mapping[str, Any],
) -> None:
    """Warn if the next steps of a training are others at a second try, or where the training is resumed.

    model, optimizer: under way; two steps more are taken.
    saved:            their checkpoint.
    """

    def resumed() -> tuple[nn.Module, torch.optim.Optimizer]:
        state = torch.load(io.BytesIO(saved), map_location=problem.device, weights_only=True)
        model = model_of_a_training(problem, config)
        optimizer = optimizer_of_a_training(problem, model, config)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        return model, optimizer

    def gradient(model: nn.Module) -> Tensor:
        model.train()
        with common_random(problem.device, seed=0):
            loss = loss_of(model, move(raw, problem.device, problem.dtype))
        return as_vector(torch.autograd.grad(loss, trained(model), allow_unused=True), trained(model))

    def stepped(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
        # Two, as a hook may change the rate of the second.
        with common_random(problem.device, seed=0):
            train_epoch(problem, model, optimizer, [raw] * 2, lambda b: loss_of(model, b), Passes(), "in a check")
        return weights(model)

    name = type(problem).__name__
    with calling(problem, "lower_loss, in train mode,"):
        (twin, its_optimizer), (other, _) = resumed(), resumed()
        if not agree(gradient(twin), gradient(other)):
            logger.warning(
                "%s.lower_loss draws random numbers in train mode that do not follow torch's seed, so that trainings "
                "with the same hyperparameters end at another F; draw from torch's global generator", name,
            )  # fmt: skip
            return
        # One that has not been differentiated, which may have changed something in it.
        twin, its_optimizer = resumed()
        before = weights(model)
        try:
            here, there = stepped(model, optimizer), stepped(twin, its_optimizer)
        except NotFiniteError:  # at this x
            return
    rounding = 100 * torch.finfo(here.dtype).eps * here.norm()
    if (here - there).norm() > OTHER_STEP * (here - before).norm() + rounding:
        logger.warning(
            "%s: a training that is resumed from a checkpoint takes other steps than one that goes on; a checkpoint "
            "has parameters, persistent buffers, and the states of optimizer and schedule(optimizer), so keep there "
            "what changes during a training", name,
        )  # fmt: skip


def weights(model: nn.Module) -> Tensor:
    return parameters_to_vector(model.parameters()).detach().clone()
