"""For how long each weight of a model was trained, in the time of the gradient flow  dy/dt = -df/dy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

SECOND_MOMENTS = ("exp_avg_sq", "square_avg", "sum")
"""Of the optimizers that divide by the root of one: the Adam family, RMSprop, Adagrad."""
LARGEST_RATIO = 100.0
"""Of such a weight's rate to that by the mean second moment of its group. Weights without gradients have no limit."""


class TrainedTime:
    """The sum over steps of the rate at which weights follow their gradient.

    A step of gradient descent with rate eta takes eta of time. With momentum m it takes eta / (1 - m), what it moves in
    all the steps that follow. Where a step divides by the root of a second moment, so does its time, for each weight.
    L-BFGS goes to a minimum, in infinite time. So does, for all that is known, any other optimizer.

    time: by the name of a tensor of weights, shape () or that of the tensor.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
        self.time = {name: torch.zeros((), device=parameter.device) for parameter, name in self.names.items()}
        self._steps = [0.0 for _ in optimizer.param_groups]

    def after_step(self, clipped: float = 1.0) -> None:
        """After each step of the optimizer, before its rate changes. clipped: what gradients were multiplied by."""
        for number, group in enumerate(self.optimizer.param_groups):
            # Floats alone here. What reads the second moments, of all weights, waits for the end of the epoch.
            self._steps[number] += clipped * float(group.get("lr", 0.0))

    def after_epoch(self) -> None:
        """The steps since the last epoch, at the second moments as they are now, are added up."""
        for number, group in enumerate(self.optimizer.param_groups):
            for parameter, rate in rates(self.optimizer, group).items():
                if parameter in self.names:
                    name = self.names[parameter]
                    # Infinite even after steps of rate 0, or 0 * infinity would be no time at all.
                    gone = torch.where(rate.isinf(), rate, self._steps[number] * rate)
                    self.time[name] = self.time[name] + gone
            self._steps[number] = 0.0

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.time)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.time = {name: time.to(self.time[name].device) for name, time in state.items()}


def rates(optimizer: Optimizer, group: Mapping[str, Any]) -> dict[Tensor, Tensor]:
    """How far a step of rate 1 moves weights along a gradient of 1, in the end, by the tensor of weights."""
    # SGD and RMSprop have it. Adam's first moment is a mean, which moves weights no further in the end.
    momentum = float(group.get("momentum", 0.0))
    slowed = 1 / (1 - momentum)
    if isinstance(optimizer, torch.optim.SGD):
        # What a gradient adds to the momentum is multiplied by 1 - dampening. Without momentum torch ignores it.
        rate = slowed * (1 - float(group["dampening"])) if momentum else 1.0
        return {parameter: torch.tensor(rate, device=parameter.device) for parameter in group["params"]}
    moments = {parameter: second_moment(optimizer.state[parameter], group) for parameter in group["params"]}
    # The others have not been moved, so their time does not grow.
    known = {parameter: moment for parameter, moment in moments.items() if moment is not None}
    if not known:
        # L-BFGS, or an optimizer that is not known.
        return {parameter: torch.tensor(math.inf, device=parameter.device) for parameter in group["params"]}
    mean = sum(float(moment.sum()) for moment in known.values()) / sum(moment.numel() for moment in known.values())
    least, eps = math.sqrt(mean) / LARGEST_RATIO, float(group.get("eps", 0.0))
    return {
        parameter: slowed * numerator(optimizer.state[parameter], eps) / (moment.sqrt().clamp_min(least) + eps)
        for parameter, moment in known.items()
    }


def numerator(state: Mapping[str, Any], eps: float) -> Tensor | float:
    """What a step is multiplied by beside its rate: with Adadelta the root mean square of past steps."""
    return (state["acc_delta"] + eps).sqrt() if "acc_delta" in state else 1.0


def second_moment(state: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor | None:
    """That of the gradients of a tensor of weights; None if the optimizer keeps none, or has not moved them yet."""
    moment: Tensor | None = next((state[name] for name in SECOND_MOMENTS if name in state), None)
    if moment is not None and "betas" in group:  # such a mean begins at 0
        moment = moment / (1 - float(group["betas"][1]) ** float(state["step"]))
    return moment


def per_weight(time: Mapping[str, Tensor] | None, model: nn.Module) -> Tensor | None:
    """Times of the tensors of a model's weights as one of each weight, shape (n,), n as in `weights_of`; None if they
    are not known."""
    if time is None:
        return None
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    return torch.cat([time[name].to(weight).expand_as(weight).flatten() for name, weight in weights.items()]).detach()
