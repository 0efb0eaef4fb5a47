"""Whether the gradient of a loss in its hyperparameters is what the loss does when they change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from raybilevel._adapters.marks import paths_of, plain
from raybilevel._lower.random_numbers import common_random
from raybilevel._tree import look_up, named, replaced
from raybilevel.errors import ProblemError
from raybilevel.problem import Batch, Hyperparameters, move

RELATIVE_STEP = 1e-4
TOLERANCE = 0.01
MOST_WEIGHTS = 20_000_000
"""Copies of larger models in double precision might not fit."""
ROUNDING = 1e-12
"""Of a loss of about 1, with much to spare."""

Loss = Callable[[nn.Module, Hyperparameters, Batch], Tensor]


def check_slopes(
    name: str,
    make_model: Callable[[Mapping[str, Any]], nn.Module],
    loss: Loss,
    hyperparameters: Hyperparameters,
    batch: Batch,
) -> None:
    """Compare the gradient with central differences, for which models are made anew of other configs.

    A model that keeps 1 - x of a hyperparameter x, made in a way that is not seen, has another gradient. In double
    precision, since a decay of 1e-6 changes nothing in single precision. Models of more than `MOST_WEIGHTS` are not
    checked.

    name: of the function that made the problem.

    Raises:
        ProblemError: they differ. The hyperparameter is named.
    """
    config, paths = plain(hyperparameters), paths_of(hyperparameters)
    batch = move(batch, "cpu", torch.double)

    def made(config: Mapping[str, Any]) -> nn.Module:
        return make_model(config).to("cpu", torch.double).eval()

    def at(model: nn.Module, config: Mapping[str, Any], given: Mapping[Any, Tensor]) -> Tensor:
        with common_random("cpu", seed=0):
            return loss(model, replaced(config, given), batch)

    with common_random("cpu", seed=0), torch.enable_grad():
        model = made(config)
        if sum(weight.numel() for weight in model.parameters()) > MOST_WEIGHTS:
            return
        x = {path: torch.tensor(look_up(config, path), dtype=torch.double, requires_grad=True) for path in paths}
        try:
            value = at(model, config, x)
            slopes = torch.autograd.grad(value, list(x.values()), allow_unused=True)
        except (RuntimeError, TypeError):  # a model that cannot compute in double precision
            return
        for path, slope in zip(paths, slopes, strict=True):
            if slope is None:
                continue
            step = RELATIVE_STEP * (abs(x[path].item()) or 1.0)
            losses = []
            for moved in (x[path].item() + step, x[path].item() - step):
                other = replaced(config, {path: moved})
                twin = made(other)
                twin.load_state_dict(model.state_dict())
                tensors = {p: torch.tensor(look_up(other, p), dtype=torch.double) for p in paths}
                with torch.no_grad():
                    losses.append(at(twin, other, tensors).item())
            difference = (losses[0] - losses[1]) / (2 * step)
            rounding = ROUNDING * (1 + abs(value.item())) / step
            if abs(difference - slope.item()) > TOLERANCE * max(abs(difference), abs(slope.item())) + rounding:
                raise ProblemError(
                    f"{name}: the training loss changes by {difference:.4g} per unit of {named(path)}, and its "
                    f"gradient in it is {slope.item():.4g}: some use of it is hidden from gradients, such as float(), "
                    f"a function of math, or a tensor made in __init__. Use it where the loss is computed, or leave "
                    f"it to values by by_values=[{named(path)!r}]"
                )
