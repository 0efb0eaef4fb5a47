"""Products with the second derivatives of f at one point: exact, or by differences of gradients."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from raybilevel.errors import ProblemError, RaybilevelError

# `functions` imports this module.
if TYPE_CHECKING:
    from raybilevel._lower.functions import BothLevels, Part


class NoisyError(RaybilevelError, ArithmeticError):
    """A difference of gradients is nothing but noise."""


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

        # Fused attention has no second derivative. The plain one has.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), second_derivatives():
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


@contextmanager
def second_derivatives() -> Iterator[None]:
    """Says what to do about a function that torch cannot differentiate twice.

    Raises:
        ProblemError: the block differentiates one.
    """
    try:
        yield
    except RuntimeError as error:
        if not NOT_TWICE.search(str(error)):
            raise
        raise ProblemError(
            f"the lower-level loss cannot be differentiated twice ({str(error).splitlines()[0]}); use estimator "
            "'first_order' or 'dynamic_barrier', which take first derivatives only, or method 'default'"
        ) from error


NOT_TWICE = re.compile("derivative for .* is not implemented|double backward|differentiate twice")
"""In what torch says of a function without a second derivative."""


class Differences:
    """Products from differences of gradients of f: no loss needs to be differentiable twice.

    A product with d2f/dy2 takes one gradient, a forward difference; with d2f/dxdy two, a central one: where f holds a
    square of y, as in weight decay, a forward difference is off by that square.

    The length follows from the precision of the gradients, which may be far less than that of the weights (autocast).
    The first product is taken with two lengths. If it changes from one to the other, there are kinks or noise, and
    others follow: one gradient more where all is well, and up to six where it is not.

    gradient:  df/dy at (x, y), where it is known already.
    precision: in which gradients are computed; None for that of y.
    coarse:    whether that is less than the precision of y, or than float32.
    apart:     how far apart two points are whose gradients are subtracted.
    noise:     of the first product, relative, where that is not known to be small; 0 else, and infinite before it.

    Products raise NoisyError if no length gives one that is more than noise.
    """

    def __init__(
        self,
        functions: BothLevels,
        x: Tensor,
        y: Tensor,
        gradient: Tensor | None = None,
        precision: torch.dtype | None = None,
    ) -> None:
        self.functions, self.x, self.y = functions, x, y
        self.gradient = functions.lower(x, y).in_y if gradient is None else gradient
        self.precision = precision or y.dtype
        self.coarse = self.precision != y.dtype or torch.finfo(y.dtype).eps > torch.finfo(torch.float32).eps
        self.apart, self.noise = difference(y, precision), math.inf

    def hessian(self, direction: Tensor) -> Tensor:
        return self._along(direction, self.apart) if self.noise < math.inf else self._first(direction)

    def _along(self, direction: Tensor, apart: float) -> Tensor:
        step = apart / norm(direction)
        return (self.functions.lower(self.x, self.y + step * direction).in_y - self.gradient) / step

    def _first(self, direction: Tensor) -> Tensor:
        """The first product, with a length at which it changes little."""
        scale, tried = self.apart, dict[int, Tensor]()

        def product(power: int) -> Tensor:
            if power not in tried:
                tried[power] = self._along(direction, scale * LONGER**power)
            return tried[power]

        best, least = 0, math.inf
        for power in POWERS_WHERE_COARSE if self.coarse else POWERS:
            change = norm(product(power) - product(power - 1)) / (norm(product(power)) or 1.0)
            if change < least:
                best, least = power, change
            if change <= NOISE:
                break
        if least > DROWNED:
            raise NoisyError(
                f"a difference of gradients changes by {100 * least:.0f} % from one length to another, so it is noise; "
                "compute the lower-level loss in a higher precision, and without random numbers"
            )
        self.apart = scale * LONGER**best
        self.noise = least / LONGER if best > 0 or self.coarse else 0.0  # it falls with the length
        return product(best)

    def mixed(self, direction: Tensor) -> Tensor:
        step = self.apart / norm(direction)
        ahead, behind = (self.functions.lower(self.x, self.y + sign * step * direction).in_x for sign in (1, -1))
        return (ahead - behind) / (2 * step)

    def mixed_transposed(self, direction: Tensor) -> Tensor:
        step = difference(self.x) / norm(direction)
        return (self.functions.lower(self.x + step * direction, self.y).in_y - self.gradient) / step


LONGER = 8.0
"""Of two lengths that follow each other, the one in units of the other."""
NOISE, DROWNED = 0.05, 0.3
"""The relative change of a product from one length to the next that is taken for none, and that which is too much."""
POWERS, POWERS_WHERE_COARSE = (0, -1, -2, 1, 2, 3), (0, 1)
"""Of `LONGER`, by which lengths are tried: first shorter ones, as the usual length passes many kinks of a network with
rectifiers in float32. Where weights are rounded before they are used, a shorter step does not move them."""


def difference(point: Tensor, precision: torch.dtype | None = None) -> float:
    """How far apart two points are whose gradients are subtracted. precision: of these, None for the point's."""
    # The errors of a forward difference are of order h (truncation) and eps / h (rounding). They are equal at
    # h = eps^(1/2), in units of the point (Nocedal & Wright 2006, Numerical Optimization, section 8.1).
    return math.sqrt(torch.finfo(precision or point.dtype).eps) * (norm(point) or 1.0)


def inner(a: Tensor, b: Tensor) -> float:
    """<a, b>, summed in double precision where the device has it."""
    # MPS has no double precision.
    wide = torch.float32 if a.device.type == "mps" else torch.double
    return a.to(wide).dot(b.to(wide)).item()


def norm(a: Tensor) -> float:
    return math.sqrt(inner(a, a))
