"""The upper-level variable as a flat vector x, and as what the losses are given; the lower-level one as a vector y."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from raybilevel._tree import leaves, replaced
from raybilevel.problem import BilevelProblem
from raybilevel.space import Space, flatten, nest

UPPER = "upper"


class UpperVariables(Protocol):
    """x, shape (p,), and its other forms.

    module: whose parameters x is, None where it is not those of a module.
    """

    module: nn.Module | None

    def given(self, x: Tensor) -> dict[str, Any]:
        """What the losses are given at x; a module is expected to have x as its parameters."""

    def project(self, x: Tensor) -> Tensor:
        """The nearest x that is allowed."""

    def rounded(self, x: Tensor) -> Tensor:
        """The nearest that can be the result."""


class BoxVariables:
    """x is a point of the unit cube of a search space, whose steps are applied to the result only."""

    module: nn.Module | None = None

    def __init__(self, space: Space, constants: Mapping[str, Any]) -> None:
        self.space, self.constants = space, flatten(constants)

    def config(self, x: Tensor) -> dict[str, Any]:
        """The trial's config at a point: plain values, steps applied, constants included."""
        return nest({**self.constants, **flatten(self.space.to_config(x.detach().cpu().double()))})

    def given(self, x: Tensor) -> dict[str, Any]:
        found = nest({**self.constants, **flatten(self.space.decode(x))})
        # Constants are tensors too, as in a training (`ConfigVariables`).
        floats = {path: x.new_tensor(value) for path, value in leaves(found).items() if isinstance(value, float)}
        given: dict[str, Any] = replaced(found, floats)
        return given

    def project(self, x: Tensor) -> Tensor:
        return x.clamp(0, 1)

    def rounded(self, x: Tensor) -> Tensor:
        if all(parameter.step is None for parameter in self.space.parameters):
            return x
        return self.space.rounded(x.detach().cpu().double()).to(x)


class ModuleVariables:
    """x is all parameters of a module. They are its own no longer: no training of y has a gradient in them."""

    module: nn.Module | None

    def __init__(self, module: nn.Module, constants: Mapping[str, Any]) -> None:
        self.module, self.constants = module.requires_grad_(False), dict(constants)

    def given(self, x: Tensor) -> dict[str, Any]:
        return {**self.constants, UPPER: self.module}

    def project(self, x: Tensor) -> Tensor:
        return x

    def rounded(self, x: Tensor) -> Tensor:
        return x


class ConfigVariables:
    """x is every float of a trial's config, also in lists, in its own units: what a training is given."""

    module: nn.Module | None = None

    def __init__(self, config: Mapping[str, Any], problem: BilevelProblem) -> None:
        self.config = config
        # Whole numbers, truth values and texts have no derivative. The losses get them as they are.
        floats = {path: value for path, value in leaves(config).items() if isinstance(value, float)}
        self.paths = list(floats)
        self.x = torch.tensor(list(floats.values()), dtype=problem.dtype, device=problem.device)

    def given(self, x: Tensor) -> dict[str, Any]:
        found: dict[str, Any] = replaced(self.config, dict(zip(self.paths, x, strict=True)))
        return found

    def project(self, x: Tensor) -> Tensor:
        return x

    def rounded(self, x: Tensor) -> Tensor:
        return x


def split(vector: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A flat vector as tensors of the names and shapes of others."""
    if not like:
        return {}
    parts = vector.split([entry.numel() for entry in like.values()])
    named = {name: part.view_as(entry) for part, (name, entry) in zip(parts, like.items(), strict=True)}
    for tensor in named.values():
        tensor._is_param = True  # so that model.get_parameter(name) takes it for one
    return named


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that y is made of."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def weights_of(model: nn.Module) -> Tensor:
    """y, shape (n,): the trainable parameters of a model, in their order."""
    return parameters_to_vector(trainable(model)).detach().clone()


def set_weights(model: nn.Module, y: Tensor) -> None:
    with torch.no_grad():
        vector_to_parameters(y, trainable(model))
