"""The upper-level variable as a flat vector x, and as what the losses are given; a problem's levels as functions."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from raybilevel.errors import ProblemError
from raybilevel.hypergradient._functions import BilevelFunctions, LowerMap, Term
from raybilevel.problem import (
    Batch,
    BilevelProblem,
    Level,
    SupportsLowerMap,
    move,
    upper_loss,
)
from raybilevel.space import Space, flatten, nest

UPPER = "upper"


class BoxVariables:
    """x is a point of the unit cube of a search space, whose steps are applied to the result only."""

    def __init__(self, space: Space, constants: Mapping[str, Any]) -> None:
        self.space, self.constants = space, flatten(constants)

    def hyperparameters(self, x: Tensor) -> dict[str, Any]:
        return nest({**self.constants, **flatten(self.space.decode(x))})

    def project(self, x: Tensor) -> Tensor:
        return x.clamp(0, 1)

    def rounded(self, x: Tensor) -> Tensor:
        if all(parameter.step is None for parameter in self.space.parameters):
            return x
        return self.space.encode(self.space.to_config(x.detach().cpu().double())).to(x)


class ModuleVariables:
    """x is all parameters of a module."""

    def __init__(self, module: nn.Module, constants: Mapping[str, Any]) -> None:
        self.module, self.constants = module, dict(constants)

    def hyperparameters(self, x: Tensor) -> dict[str, Any]:
        with torch.no_grad():
            vector_to_parameters(x, self.module.parameters())
        return {**self.constants, UPPER: self.module}

    def project(self, x: Tensor) -> Tensor:
        return x

    def rounded(self, x: Tensor) -> Tensor:
        return x


UpperVariables = BoxVariables | ModuleVariables
"""x, shape (p,), and its other form: `hyperparameters`, what the losses are given at x; `project`, the nearest x that
is allowed; `rounded`, the nearest that can be the result."""


class BothLevels(nn.Module):
    """A problem's losses as a module, so that `torch.func.functional_call` can put x and y in its place."""

    def __init__(self, problem: BilevelProblem, model: nn.Module, variables: UpperVariables) -> None:
        super().__init__()
        self.problem, self.model, self.variables = problem, model, variables
        self.upper = variables.module if isinstance(variables, ModuleVariables) else None

    def forward(self, level: Level | Literal["map"], x: Tensor, batch: Batch) -> Tensor:
        given: Mapping[str, Any] = (
            {**self.variables.constants, UPPER: self.upper}
            if isinstance(self.variables, ModuleVariables)
            else self.variables.hyperparameters(x)
        )
        if level == "upper":
            return upper_loss(self.problem, self.model, given, batch)
        if level == "map":
            assert isinstance(self.problem, SupportsLowerMap)
            return self.problem.lower_map(self.model, given, batch)
        return self.problem.lower_loss(self.model, given, batch)


def bilevel_functions(problem: BilevelProblem, model: nn.Module, variables: UpperVariables) -> BilevelFunctions:
    """F and f of a problem over all its batches, model and upper-level module in eval mode.

    Raises:
        ProblemError: a level has no data, or one that is a fixed point has more than one batch.
    """
    both = BothLevels(problem, model, variables)
    both.eval()
    inner = {f"model.{name}": w for name, w in model.named_parameters() if w.requires_grad}
    outer = dict(both.upper.named_parameters(prefix="upper")) if both.upper is not None else {}

    def evaluate(level: Level | Literal["map"], x: Tensor, y: Tensor, batch: Batch) -> Tensor:
        given = {**split(y, inner), **split(x, outer)}
        found: Tensor = torch.func.functional_call(both, given, (level, x, batch))
        return found

    def terms(level: Level) -> tuple[list[Term], int]:
        batches = list(problem.batches(level, None))
        sizes = [problem.batch_size(batch) for batch in batches]
        if sum(sizes) == 0:
            raise ProblemError(f"{type(problem).__name__}.batches({level!r}, None) yields no examples")

        def term(batch: Batch, share: float) -> Term:
            moved = move(batch, problem.device, problem.dtype)

            return lambda x, y: evaluate(level, x, y, moved) * share

        return [term(b, size / sum(sizes)) for b, size in zip(batches, sizes, strict=True)], sum(sizes)

    (upper, upper_size), (lower, lower_size) = terms("upper"), terms("lower")
    lower_map: LowerMap | None = None
    if is_fixed_point(problem):
        batches = [move(batch, problem.device, problem.dtype) for batch in problem.batches("lower", None)]
        if len(batches) != 1:
            raise ProblemError(f"{type(problem).__name__}: with a lower_map, the lower level must be one batch")
        lower_map = functools.partial(evaluate, "map", batch=batches[0])
    return BilevelFunctions(upper, lower, upper_size / lower_size, lower_map)


def is_fixed_point(problem: BilevelProblem) -> bool:
    """Whether the lower level is y = g(x, y) and not a minimum."""
    return isinstance(problem, SupportsLowerMap)


def split(vector: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A flat vector as tensors of the names and shapes of others."""
    if not like:
        return {}
    parts = vector.split([entry.numel() for entry in like.values()])
    named = {name: part.view_as(entry) for part, (name, entry) in zip(parts, like.items(), strict=True)}
    for tensor in named.values():
        tensor._is_param = True  # so that model.get_parameter(name) takes it for one
    return named


def weights_of(model: nn.Module) -> Tensor:
    """y, shape (n,): the trainable parameters of a model, in their order."""
    return parameters_to_vector(w for w in model.parameters() if w.requires_grad).detach().clone()


def set_weights(model: nn.Module, y: Tensor) -> None:
    with torch.no_grad():
        vector_to_parameters(y, (w for w in model.parameters() if w.requires_grad))
