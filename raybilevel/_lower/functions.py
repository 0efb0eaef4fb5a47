"""F(x, y) and f(x, y) of two flat vectors, and their gradients."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from raybilevel._lower.linearisation import Linearisation
from raybilevel._lower.passes import Passes
from raybilevel.errors import NotFiniteError
from raybilevel.problem import Level

Term = Callable[[Tensor, Tensor], Tensor]
"""A part of a level as a function of x, shape (p,), and y, shape (n,), differentiable in both; shape ()."""

LowerMap = Callable[[Tensor, Tensor], Tensor]
"""g of a lower level y = g(x, y), as a function of x, shape (p,), and y, shape (n,): shape (rows, n / rows), in y's
order; the rows are independent of each other."""


NO_GRAPH = "does not require grad"
"""In what torch says of a gradient that is taken without a graph."""


class LevelGradient(NamedTuple):
    """A level's value and its gradients in x, shape (p,), and in y, shape (n,)."""

    value: float
    in_x: Tensor
    in_y: Tensor


class Part(NamedTuple):
    """What a level is the weighted mean of, e.g. the loss of one batch.

    examples: that its gradient is charged.
    """

    loss: Tensor
    weight: float
    examples: float


class BothLevels(ABC):
    """Both levels as functions of x and y. They are taken part by part, so that one part's graph is held at a time.

    ledger: where gradients are charged.
    differentiate_themselves: losses take gradients of the model on their own, e.g. in its inputs, and need a graph for
        their value. It is seen when that fails without one.
    """

    ledger: Passes
    differentiate_themselves = False

    @abstractmethod
    def visit(self, level: Level, x: Tensor, y: Tensor, take: Callable[[Part], None]) -> float:
        """Show `take` each part of a level at (x, y), differentiable where x and y are; returns the sum of weights."""

    @abstractmethod
    def is_single(self, level: Level) -> bool:
        """Whether a level is known to have one part, so that keeping its graph takes no more memory than a gradient."""

    @abstractmethod
    def mapped(self, x: Tensor, y: Tensor) -> Tensor:
        """g(x, y) of a fixed point, shape (rows, n / rows); differentiable where x and y are. Half a pass."""

    @property
    def passes(self) -> float:
        """What was spent, in gradients of f."""
        return self.ledger.count

    def value(self, level: Level, x: Tensor, y: Tensor) -> float:
        """A level's value. It is free."""
        total = 0.0

        def take(part: Part) -> None:
            nonlocal total
            total += part.loss.item() * part.weight

        try:
            with torch.set_grad_enabled(self.differentiate_themselves):
                weights = self.visit(level, x.detach(), y.detach(), take)
        except RuntimeError as error:
            if self.differentiate_themselves or NO_GRAPH not in str(error):
                raise
            self.differentiate_themselves = True
            return self.value(level, x, y)
        return self.mean(total, weights).value

    def loss_at(self, level: Level, x: Tensor, y: Tensor) -> Tensor:
        """A level as a tensor, shape (), with the graph of all its parts; for others to differentiate, free here."""
        parts: list[Tensor] = []
        weights = self.visit(level, x, y, lambda part: parts.append(part.loss * part.weight))
        return torch.stack(parts).sum() / weights

    def upper(self, x: Tensor, y: Tensor) -> LevelGradient:
        """F and its gradients."""
        return self.gradient("upper", x, y)

    def lower(self, x: Tensor, y: Tensor) -> LevelGradient:
        """f and its gradients."""
        return self.gradient("lower", x, y)

    def linearise(self, x: Tensor, y: Tensor) -> Linearisation:
        """df/dy around (x, y), for products with its derivatives."""
        return Linearisation(self, x, y)

    def gradient(self, level: Level, x: Tensor, y: Tensor) -> LevelGradient:
        """A level and its gradients, zero in what it does not depend on."""
        total, in_x, in_y = 0.0, torch.zeros_like(x), torch.zeros_like(y)
        # Leaves of their own, so that the caller's tensors are not asked for gradients.
        x, y = x.detach().requires_grad_(True), y.detach().requires_grad_(True)

        def take(part: Part) -> None:
            nonlocal total
            total += part.loss.item() * part.weight
            self.ledger.charge(part.examples)
            if not part.loss.requires_grad:  # a constant
                return
            found = torch.autograd.grad(part.loss, (x, y), allow_unused=True, materialize_grads=True)
            in_x.add_(found[0], alpha=part.weight)
            in_y.add_(found[1], alpha=part.weight)

        with torch.enable_grad():
            weights = self.visit(level, x, y, take)
        return self.mean(total, weights, in_x, in_y)

    def mean(self, total: float, weights: float, *sums: Tensor) -> LevelGradient:
        """The means of sums over parts; where a level is shared out among processes, over all of them."""
        in_x, in_y = (entry / weights for entry in sums) if sums else (torch.empty(0),) * 2
        return LevelGradient(total / weights, in_x, in_y)


class BilevelFunctions(BothLevels):
    """Both levels, each the sum of terms that are given.

    upper_cost: what a gradient of F costs in gradients of f.
    lower_map:  g, where the lower level is a fixed point; None where it is a minimum.
    """

    def __init__(
        self,
        upper_terms: Sequence[Term],
        lower_terms: Sequence[Term],
        upper_cost: float = 1.0,
        lower_map: LowerMap | None = None,
    ) -> None:
        self.upper_terms, self.lower_terms = upper_terms, lower_terms
        self.upper_cost, self.lower_map = upper_cost, lower_map
        self.ledger = Passes(whole=1)

    def terms(self, level: Level) -> Sequence[Term]:
        return self.upper_terms if level == "upper" else self.lower_terms

    def visit(self, level: Level, x: Tensor, y: Tensor, take: Callable[[Part], None]) -> float:
        terms, cost = self.terms(level), self.upper_cost if level == "upper" else 1.0
        for term in terms:
            # Terms are summed and not averaged, so the weights do not add up: their sum is given as 1.
            take(Part(term(x, y), 1.0, cost / len(terms)))
        return 1.0

    def is_single(self, level: Level) -> bool:
        return len(self.terms(level)) == 1

    def mapped(self, x: Tensor, y: Tensor) -> Tensor:
        assert self.lower_map is not None
        self.ledger.charge(0.5)
        return self.lower_map(x, y)


def finite(level: Level, value: float) -> float:
    """A level's value.

    Raises:
        NotFiniteError: it is NaN or infinite.
    """
    if not math.isfinite(value):
        raise NotFiniteError(f"the {level}-level loss is {value}")
    return value
