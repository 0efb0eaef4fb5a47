"""Whether each training begins anew: a model and an optimizer of its own, and the same weights for every x."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from raybilevel.errors import ProblemError
from raybilevel.problem import BilevelProblem, make_model, make_optimizer
from raybilevel.search._calls import calling

logger = logging.getLogger(__name__)

NAMES_SHOWN = 3


def model_of_a_training(problem: BilevelProblem, config: Mapping[str, Any]) -> nn.Module:
    """A model as a training of seed 0 begins with, on the problem's device.

    Raises:
        ProblemError: it is no module, or has nothing to train.
    """
    name = type(problem).__name__
    torch.manual_seed(0)
    with calling(problem, "model()"):
        model = make_model(problem, config)
    # Uninitialised parameters have no shape, which all that follows needs.
    if any(nn.parameter.is_lazy(tensor) for tensor in tensors(model).values()):
        raise ProblemError(f"{name}.model() has lazy layers; give them their sizes, e.g. Linear(64, 10)")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ProblemError(f"{name}.model() has no parameters to train")
    return model


def check_fresh_model(problem: BilevelProblem, earlier: nn.Module, model: nn.Module) -> dict[str, Tensor]:
    """Whether a second model, at the same seed, is as the first was, and another one.

    Returns:
        What they share: frozen parameters and buffers, which no training may change.

    Raises:
        ProblemError: they share weights that are trained, or their weights differ.
    """
    name = type(problem).__name__
    before = tensors(earlier)
    # Empty tensors all have the address 0, and share nothing.
    places = {place(tensor) for tensor in before.values() if tensor.numel()}
    shared = {key: tensor for key, tensor in tensors(model).items() if tensor.numel() and place(tensor) in places}
    trained = [key for key, tensor in shared.items() if tensor.requires_grad]
    if trained:
        raise ProblemError(
            f"{name}.model() returned weights of an earlier model ({listed(trained)}): each training would start from "
            "those that the last one left; make a new model at each call, e.g. by copy.deepcopy"
        )
    different = [key for key, tensor in tensors(model).items() if not same(before.get(key), tensor)]
    if different or len(before) != len(tensors(model)):
        raise ProblemError(
            f"{name}.model() is another one at each call under the same seed ({listed(different or list(before))}), so "
            "that F would not be a function of the hyperparameters; take random numbers from torch's global "
            "generator, or from a generator that is made within model()"
        )
    return shared


def optimizer_of_a_training(
    problem: BilevelProblem, model: nn.Module, config: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """What trains a model.

    Raises:
        ProblemError: it is no optimizer, or trains parameters of something else.
    """
    name = type(problem).__name__
    with calling(problem, "optimizer(model)"):
        optimizer = make_optimizer(problem, model, config)
    if not all(hasattr(optimizer, needed) for needed in ("step", "zero_grad", "param_groups", "state_dict")):
        raise ProblemError(f"{name}.optimizer must return a torch optimizer, got {type(optimizer).__name__}")
    # By identity, as == of tensors compares entries.
    own = {id(parameter) for parameter in model.parameters()}
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    foreign = sum(id(parameter) not in own for parameter in trained)
    if foreign:
        raise ProblemError(
            f"{name}.optimizer(model): {foreign} of {len(trained)} parameters are not those of the model that it was "
            "given, so that they would outlive the training; make a new optimizer of model.parameters() at each call"
        )
    return optimizer


def optimizers_of_trainings(
    problem: BilevelProblem, models: Sequence[nn.Module], config: Mapping[str, Any]
) -> list[torch.optim.Optimizer]:
    """What trains each of several models.

    Raises:
        ProblemError: it is no optimizer, trains parameters of something else, or is one object for two models.
    """
    # In the order of the models: an optimizer that the problem keeps would be that of the first.
    optimizers = [optimizer_of_a_training(problem, model, config) for model in models]
    if len({id(optimizer) for optimizer in optimizers}) < len(optimizers):
        raise ProblemError(
            f"{type(problem).__name__}.optimizer(model) returned the optimizer of an earlier model: its rates and "
            "averages would outlive the training; make a new optimizer of model.parameters() at each call"
        )
    return optimizers


def warn_of_scheduler(problem: BilevelProblem, optimizer: torch.optim.Optimizer) -> None:
    """A scheduler that `optimizer` makes, stepped by a hook of its own, is no part of a checkpoint."""
    if any("initial_lr" in group for group in optimizer.param_groups):  # which every scheduler of torch sets
        logger.warning(
            "%s.optimizer makes a learning-rate scheduler, which starts again where a training is resumed from a "
            "checkpoint; return it from schedule(optimizer) instead, so that its state is kept", type(problem).__name__,
        )  # fmt: skip


def check_unchanged(problem: BilevelProblem, shared: dict[str, Tensor], before: dict[str, Tensor]) -> None:
    """Whether what models share is as it was before a step of the training.

    Raises:
        ProblemError: it is not.
    """
    changed = [key for key, tensor in shared.items() if not same(before[key], tensor)]
    if changed:
        raise ProblemError(
            f"{type(problem).__name__}.model() shares {listed(changed)} with an earlier model, and a step of training "
            "changes that: each training would start from what the last one left; make a new model at each call, e.g. "
            "by copy.deepcopy"
        )


def check_same_start(problem: BilevelProblem, earlier: nn.Module, later: nn.Module) -> None:
    """Whether a model that is made after a step of training starts as one made before.

    Raises:
        ProblemError: it does not.
    """
    before = tensors(earlier)
    if different := [key for key, tensor in tensors(later).items() if not same(before.get(key), tensor)]:
        raise ProblemError(
            f"{type(problem).__name__}.model() is another one after a step of training ({listed(different)}): each "
            "training would start from what the last one left; keep no weights of a training in the problem"
        )


def copies(model: nn.Module) -> dict[str, Tensor]:
    """Its tensors as they are now."""
    return {key: tensor.detach().clone() for key, tensor in tensors(model).items()}


def changes(model: nn.Module, before: Mapping[str, Tensor]) -> list[str]:
    """The names of its tensors that are others than before."""
    now = tensors(model)
    return [key for key, tensor in before.items() if key not in now or not same(tensor, now[key])]


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def place(tensor: Tensor) -> int:
    """The same number for tensors that share memory."""
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else id(tensor)


def same(one: Tensor | None, other: Tensor) -> bool:
    """Whether two tensors are equal to the last bit; NaN is equal to NaN."""
    if one is None or one.shape != other.shape or one.dtype != other.dtype or one.layout != other.layout:
        return False
    if one.layout != torch.strided:
        one, other = one.to_dense(), other.to_dense()
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


def listed(names: list[str]) -> str:
    """Names for a message, not all of hundreds."""
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more
