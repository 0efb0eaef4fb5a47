"""Losses of torch that take tensors for their hyperparameters while a hyperparameter is one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from raybilevel import functional as ours

DIFFERENTIABLE: Mapping[Callable[..., Any], tuple[Callable[..., Any], tuple[str, ...]]] = {
    functional.cross_entropy: (ours.cross_entropy, ("label_smoothing", "weight")),
    functional.binary_cross_entropy_with_logits: (ours.binary_cross_entropy_with_logits, ("weight", "pos_weight")),
    functional.huber_loss: (ours.huber_loss, ("delta",)),
    functional.smooth_l1_loss: (ours.smooth_l1_loss, ("beta",)),
    functional.leaky_relu: (ours.leaky_relu, ("negative_slope",)),
    functional.dropout: (ours.dropout, ("p",)),
}
"""torch's function, that of `raybilevel.functional`, and the arguments in which only the latter is differentiable."""


class TakesTensors(TorchFunctionMode):
    """Within it torch's losses are differentiable in hyperparameters that are tensors.

    A function that has no such form gets the hyperparameter as a number.

    placed: the tensors that stand for hyperparameters.
    """

    def __init__(self, placed: Collection[Tensor]) -> None:
        super().__init__()
        self.placed = {id(tensor) for tensor in placed}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in DIFFERENTIABLE:
            function, names = DIFFERENTIABLE[func]
            given = inspect.signature(func).bind(*args, **kwargs).arguments
            if any(needs_ours(given.get(name)) for name in names):
                taken = inspect.signature(function).parameters
                # What it does not have is torch's `inplace`, or has no effect while it is None.
                return function(**{name: value for name, value in given.items() if name in taken})
        try:
            return func(*args, **kwargs)
        except (TypeError, RuntimeError):
            numbers = [self.number(value) for value in args], {key: self.number(kwargs[key]) for key in kwargs}
            if all(a is b for a, b in zip((*numbers[0], *numbers[1].values()), (*args, *kwargs.values()), strict=True)):
                raise
            return func(*numbers[0], **numbers[1])

    def number(self, value: Any) -> Any:
        """A tensor that stands for a hyperparameter as a number."""
        return value.item() if isinstance(value, Tensor) and id(value) in self.placed else value


def needs_ours(argument: Any) -> bool:
    """Whether torch's function would refuse an argument. It takes weights of classes, but no gradient in them."""
    return isinstance(argument, Tensor) and (argument.requires_grad or argument.dim() == 0)
