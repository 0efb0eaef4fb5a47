"""Products with the second derivatives of f at one point: exact, or by differences of gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

# `functions` imports this module.
if TYPE_CHECKING:
    from raybilevel._lower.functions import BothLevels, Part


class Products(Protocol):
    """Products with d2f/dy2, symmetric (n, n), and with d2f/dxdy, (p, n); never the matrices themselves."""

    def hessian(self, direction: Tensor) -> Tensor:
        """d2f/dy2 times a direction, shape (n,)."""

    def mixed(self, direction: Tensor) -> Tensor:
        """d2f/dxdy times a direction in y, shape (p,): the gradient in x of <df/dy, direction>."""

    def mixed_transposed(self, direction: Tensor) -> Tensor:
        """d2f/dydx times a direction in x, shape (n,): the derivative of df/dy along it."""


class _Graph(NamedTuple):
    """df/dy of one part, with the graph that leads to it; the part's weight, the sum of weights, and its charge."""

    gradient: Tensor
    weight: float
    examples: float


class Linearisation:
    """Exact products, by differentiating df/dy; each counts as one pass.

    Where f has one part the graph of df/dy is kept, and a product is one backward pass through it. With several it is
    built again for each product, so that memory does not grow with the data.
    """

    def __init__(self, functions: BothLevels, x: Tensor, y: Tensor) -> None:
        self.functions = functions
        self.x, self.y = x.detach().requires_grad_(True), y.detach().requires_grad_(True)
        self._kept: tuple[_Graph, float] | None = None

    def hessian(self, direction: Tensor) -> Tensor:
        return self._sum(self.y, lambda graph: self._back(graph, self.y, direction))

    def mixed(self, direction: Tensor) -> Tensor:
        return self._sum(self.x, lambda graph: self._back(graph, self.x, direction))

    def mixed_transposed(self, direction: Tensor) -> Tensor:
        return self._sum(self.y, lambda graph: self._forward(graph, direction))

    @staticmethod
    def _back(graph: _Graph, wrt: Tensor, direction: Tensor) -> Tensor | None:
        (found,) = torch.autograd.grad(
            graph.gradient, wrt, direction, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return found

    def _forward(self, graph: _Graph, direction: Tensor) -> Tensor | None:
        # Differentiating <gradient, dummy> twice gives a forward product from two backward ones.
        dummy = torch.zeros_like(graph.gradient, requires_grad=True)
        (in_x,) = torch.autograd.grad(
            graph.gradient, self.x, dummy,
            retain_graph=True, create_graph=True, allow_unused=True, materialize_grads=True,
        )  # fmt: skip
        if not in_x.requires_grad:
            return None
        (found,) = torch.autograd.grad(in_x, dummy, direction, retain_graph=True)
        return found

    def _sum(self, like: Tensor, product: Callable[[_Graph], Tensor | None]) -> Tensor:
        """The mean over parts of what a product with one part's derivatives is, in the shape of `like`."""
        total = torch.zeros_like(like, requires_grad=False)

        def add(graph: _Graph) -> None:
            self.functions.ledger.charge(graph.examples)
            # df/dy may be constant: the part is linear
            found = product(graph) if graph.gradient.requires_grad else None
            if found is not None:
                total.add_(found.detach(), alpha=graph.weight)

        with torch.enable_grad():
            if self._kept is not None:
                graph, weights = self._kept
                add(graph)
                return total / weights
            last: list[_Graph] = []
            # Levels know this after a first pass over the data. Until then each product builds its graph.
            keep = self.functions.is_single("lower")

            def take(part: Part) -> None:
                graph = self._graph(part)
                if keep:
                    last.append(graph)
                add(graph)

            weights = self.functions.visit("lower", self.x, self.y, take)
        if keep:
            self._kept = last[0], weights
        return total / weights

    def _graph(self, part: Part) -> _Graph:
        if part.loss.requires_grad:
            (gradient,) = torch.autograd.grad(
                part.loss, self.y, create_graph=True, allow_unused=True, materialize_grads=True
            )
        else:  # a constant
            gradient = torch.zeros_like(self.y, requires_grad=False)
        return _Graph(gradient, part.weight, part.examples)


class Differences:
    """Products from differences of gradients of f: no loss needs to be differentiable twice.

    A product with d2f/dy2 takes one gradient, a forward difference; with d2f/dxdy two, a central one: where f holds a
    square of y, as in weight decay, a forward difference is off by that square.

    gradient: df/dy at (x, y), where it is known already.
    """

    def __init__(self, functions: BothLevels, x: Tensor, y: Tensor, gradient: Tensor | None = None) -> None:
        self.functions, self.x, self.y = functions, x, y
        self.gradient = functions.lower(x, y).in_y if gradient is None else gradient

    def hessian(self, direction: Tensor) -> Tensor:
        step = difference(self.y) / norm(direction)
        return (self.functions.lower(self.x, self.y + step * direction).in_y - self.gradient) / step

    def mixed(self, direction: Tensor) -> Tensor:
        step = difference(self.y) / norm(direction)
        ahead, behind = (self.functions.lower(self.x, self.y + sign * step * direction).in_x for sign in (1, -1))
        return (ahead - behind) / (2 * step)

    def mixed_transposed(self, direction: Tensor) -> Tensor:
        step = difference(self.x) / norm(direction)
        return (self.functions.lower(self.x + step * direction, self.y).in_y - self.gradient) / step


def difference(point: Tensor) -> float:
    """How far apart two points are whose gradients are subtracted."""
    # The errors of a forward difference are of order h (truncation) and eps / h (rounding). They are equal at
    # h = eps^(1/2), in units of the point (Nocedal & Wright 2006, Numerical Optimization, section 8.1).
    return math.sqrt(torch.finfo(point.dtype).eps) * (norm(point) or 1.0)


def inner(a: Tensor, b: Tensor) -> float:
    """<a, b>, summed in double precision where the device has it."""
    # MPS has no double precision.
    wide = torch.float32 if a.device.type == "mps" else torch.double
    return a.to(wide).dot(b.to(wide)).item()


def norm(a: Tensor) -> float:
    return math.sqrt(inner(a, a))
