"""Where a user expects the optimum: for a number a normal distribution, for a choice a weight of each value.

A number's distribution is normal on the scale of its search, and cut off at its bounds. So the deviation is in decades
for a logarithmic scale, and in the hyperparameter's own unit otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.special import ndtr, ndtri

from raybilevel._parameter import Parameter, is_finite_number, same
from raybilevel.errors import SpaceError


def given_priors(parameters: Sequence[Parameter], priors: Mapping[str, Any]) -> tuple[Parameter, ...]:
    """The hyperparameters with these priors, nested as the space is. One given for a group holds for all within.

    Raises:
        SpaceError: an entry is none, or belongs to no hyperparameter.
    """
    if not isinstance(priors, Mapping):
        raise SpaceError(f"priors: expected a mapping such as {{'lr': (1e-3, 0.5)}}, got {priors!r}")
    found = list(parameters)

    def visit(name: str, entry: Any) -> None:
        below = [i for i, p in enumerate(parameters) if f"{p.name}/".startswith(f"{name}/") and not p.switch]
        if not below:
            known = ", ".join(p.name for p in parameters if not p.switch)
            raise SpaceError(f"priors: {name} is not in the space, which has {known}")
        if isinstance(entry, Mapping) and all(parameters[i].name != name for i in below):
            for key, value in entry.items():
                visit(f"{name}/{key}", value)
            return
        for i in below:
            found[i] = with_prior(parameters[i], entry)

    for key, entry in priors.items():
        visit(str(key), entry)
    return tuple(found)


def with_prior(parameter: Parameter, entry: Any) -> Parameter:
    if parameter.grid:
        raise SpaceError(f"priors: {parameter.name} is not searched: each value of a grid gets as many trials")
    if parameter.choices:
        return replace(parameter, prior=weights(parameter, entry))
    pair: Sequence[Any] = entry if isinstance(entry, list | tuple) and len(entry) == 2 else (None, None)
    if not all(map(is_finite_number, pair)) or not parameter.contains(pair[0]) or not pair[1] > 0:
        unit = "in decades" if parameter.log else "in its unit"
        raise SpaceError(
            f"priors: {parameter.name}: expected a value within [{parameter.low:.6g}, {parameter.high:.6g}] and a "
            f"positive deviation {unit}, got {entry!r}"
        )
    return replace(parameter, prior=tuple(map(float, pair)))


def weights(parameter: Parameter, entry: Any) -> tuple[float, ...]:
    """Of the choices in their order, the largest 1."""
    given = list(entry.items()) if isinstance(entry, Mapping) else []
    found = [[weight for key, weight in given if same(key, choice)] for choice in parameter.choices]
    numbers = [weight for of_choice in found for weight in of_choice if is_finite_number(weight) and weight > 0]
    if not len(numbers) == len(given) == len(found):
        named = ", ".join(map(repr, parameter.choices))
        raise SpaceError(
            f"priors: {parameter.name}: expected a mapping with a positive weight for each of {named}, got {entry!r}"
        )
    return tuple(weight / max(numbers) for weight in numbers)


def log_density(parameter: Parameter, unit: Tensor) -> Tensor:
    """At unit-cube coordinates, any shape, differentiable; 0 at its largest."""
    if parameter.choices:
        levels = torch.tensor(parameter.levels, dtype=unit.dtype)
        nearest = (unit.unsqueeze(-1) - levels).abs().argmin(-1)
        return torch.tensor(parameter.prior, dtype=unit.dtype).log()[nearest]
    value, deviation = parameter.prior
    number = parameter.number(unit)
    distance = (number / value).log10() if parameter.log else number - value
    return -(distance / deviation).square() / 2


def mode(parameter: Parameter) -> float:
    """The unit-cube coordinate of its largest density."""
    if parameter.choices:
        return parameter.levels[parameter.prior.index(max(parameter.prior))]
    return parameter.encode(parameter.prior[0])


def quantiles(parameter: Parameter, shares: Tensor) -> Tensor:
    """The unit-cube coordinates below which these shares of the distribution lie, shape (n,) -> (n,)."""
    if parameter.choices:
        below = torch.tensor(parameter.prior, dtype=shares.dtype).cumsum(0)
        number = torch.searchsorted(below / below[-1], shares.contiguous()).clamp_max(len(below) - 1)
        return torch.tensor(parameter.levels, dtype=shares.dtype)[number]
    value, deviation = parameter.prior

    def scaled(number: float) -> float:
        return math.log10(number) if parameter.log else number

    ends = torch.tensor([parameter.low, parameter.high], dtype=shares.dtype)
    low, high = ndtr(((ends.log10() if parameter.log else ends) - scaled(value)) / deviation)
    positions = (scaled(value) + deviation * ndtri(low + shares * (high - low))).tolist()
    entries = [parameter.encode(10**position if parameter.log else position) for position in positions]
    return torch.tensor(entries, dtype=shares.dtype)
