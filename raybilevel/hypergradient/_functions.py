"""F(x, y) and f(x, y) of two flat vectors, their gradients, and products with the second derivatives of f."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

Term = Callable[[Tensor, Tensor], Tensor]
"""A part of a level as a function of x, shape (p,), and y, shape (n,), differentiable in both; shape ()."""


class LevelGradient(NamedTuple):
    """A level's value and its gradients in x, shape (p,), and in y, shape (n,)."""

    value: float
    in_x: Tensor
    in_y: Tensor


LowerMap = Callable[[Tensor, Tensor], Tensor]
"""g of a lower level y = g(x, y), as a function of x, shape (p,), and y, shape (n,): shape (rows, n / rows), in y's
order; the rows are independent of each other."""


@dataclass
class BilevelFunctions:
    """Both levels, each as a sum of terms (one a batch), so that only one term's graph is held at a time.

    lower_map:  g, where the lower level is a fixed point; None where it is a minimum.
    upper_cost: what a gradient of F costs in gradients of f.
    passes:     what has been spent, in gradients of f; a product with second derivatives counts as one.
    """

    upper_terms: Sequence[Term]
    lower_terms: Sequence[Term]
    upper_cost: float = 1.0
    lower_map: LowerMap | None = None
    passes: float = field(default=0.0, init=False)

    def upper(self, x: Tensor, y: Tensor) -> LevelGradient:
        """F and its gradients."""
        self.passes += self.upper_cost
        return _gradient(self.upper_terms, x, y)

    def lower(self, x: Tensor, y: Tensor) -> LevelGradient:
        """f and its gradients."""
        self.passes += 1
        return _gradient(self.lower_terms, x, y)

    def mapped(self, x: Tensor, y: Tensor) -> Tensor:
        """g(x, y), shape (rows, n / rows); differentiable where x and y are."""
        assert self.lower_map is not None
        self.passes += 0.5  # a gradient takes a pass forward and one back
        return self.lower_map(x, y)

    def linearise(self, x: Tensor, y: Tensor) -> Linearisation:
        """df/dy around (x, y), for products with its derivatives."""
        return Linearisation(self, x, y)


class Linearisation:
    """Products with d2f/dy2, symmetric (n, n), and with d2f/dxdy, (p, n), at one point; never the matrices themselves.

    With one term the graph of df/dy is kept, and a product is one backward pass through it; with several it is built
    again for each product, so that memory does not grow with the data.
    """

    def __init__(self, functions: BilevelFunctions, x: Tensor, y: Tensor) -> None:
        self.functions, self.x, self.y = functions, x, y
        self._kept = self._graph(functions.lower_terms[0]) if len(functions.lower_terms) == 1 else None

    def hessian(self, direction: Tensor) -> Tensor:
        """d2f/dy2 times a direction, shape (n,)."""
        return self._product(direction, 1)

    def mixed(self, direction: Tensor) -> Tensor:
        """d2f/dxdy times a direction in y, shape (p,): the gradient in x of <df/dy, direction>."""
        return self._product(direction, 0)

    def mixed_transposed(self, direction: Tensor) -> Tensor:
        """d2f/dydx times a direction in x, shape (n,): the derivative of df/dy along it."""
        self.functions.passes += 1
        total = torch.zeros_like(self.y)
        for x, _, gradient in self._graphs():
            if not gradient.requires_grad:  # df/dy is constant: the term is linear
                continue
            # Differentiating <gradient, dummy> twice gives a forward product from two backward ones.
            dummy = torch.zeros_like(gradient, requires_grad=True)
            (in_x,) = torch.autograd.grad(
                gradient, x, dummy, retain_graph=True, create_graph=True, allow_unused=True, materialize_grads=True
            )
            if in_x.requires_grad:
                (part,) = torch.autograd.grad(in_x, dummy, direction, retain_graph=True)
                total += part
        return total

    def _product(self, direction: Tensor, wrt: int) -> Tensor:
        self.functions.passes += 1
        total = torch.zeros_like((self.x, self.y)[wrt])
        for graph in self._graphs():
            if not graph[2].requires_grad:  # df/dy is constant: the term is linear
                continue
            (part,) = torch.autograd.grad(
                graph[2], graph[wrt], direction, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            total += part
        return total

    def _graphs(self) -> Sequence[tuple[Tensor, Tensor, Tensor]] | map[tuple[Tensor, Tensor, Tensor]]:
        return [self._kept] if self._kept is not None else map(self._graph, self.functions.lower_terms)

    def _graph(self, term: Term) -> tuple[Tensor, Tensor, Tensor]:
        x, y = self.x.detach().requires_grad_(True), self.y.detach().requires_grad_(True)
        part = term(x, y)
        if not part.requires_grad:  # a constant
            return x, y, torch.zeros_like(y)
        (gradient,) = torch.autograd.grad(part, y, create_graph=True, allow_unused=True, materialize_grads=True)
        return x, y, gradient


def _gradient(terms: Sequence[Term], x: Tensor, y: Tensor) -> LevelGradient:
    value, in_x, in_y = 0.0, torch.zeros_like(x), torch.zeros_like(y)
    x, y = x.detach().requires_grad_(True), y.detach().requires_grad_(True)
    for term in terms:
        part = term(x, y)
        value += part.item()
        if not part.requires_grad:  # a constant
            continue
        gradients = torch.autograd.grad(part, (x, y), allow_unused=True, materialize_grads=True)
        in_x += gradients[0]
        in_y += gradients[1]
    return LevelGradient(value, in_x, in_y)
