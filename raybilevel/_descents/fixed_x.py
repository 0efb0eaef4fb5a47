"""Hypergradients at fixed x from gradients alone: how trained weights answer to x."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from raybilevel._descents.trained_point import TrainedPoint
from raybilevel._linear.lanczos import Filtered, filtered
from raybilevel._lower.hypergradient import Hypergradient, checked
from raybilevel._lower.levels import Levels
from raybilevel._lower.linearisation import Differences, NoisyError, inner

logger = logging.getLogger(__name__)

UNFINISHED_TOLERANCE, UNFINISHED_PRODUCTS = 0.1, 10
"""Of a training of finite time: more products answer for directions that such a training has not followed."""
FEW_PRODUCTS = 3
"""Enough for the direction, and mostly for the length, of the answer of such a training."""
FINISHED_TOLERANCE = 0.02
MOST_SHARE = 0.35
"""Of a training's gradient evaluations, for a hypergradient that needs more than usual."""
WORTH_A_TRAINING = 10
"""Derivatives for which the first few products may cost as much as a training."""
FLAT = 1e-4
"""Curvatures below this share of the largest are those of directions along which f is flat."""
STAYED = 3.0
"""Of an unknown time of training, in units of 1 / c, where -c is the lowest curvature at its end."""

ERROR, ERROR_OF_UNFINISHED = 0.03, 0.2
"""Of what F changes through the weights: the hypergradient's error there, after a training to a minimum and after one
of finite time (80 % of entries are within 0.04 and 0.3 of differences of trained F, on ridges and logistic
regressions)."""

MOST_SHORTENED = 0.2
"""Of an answer, by coarse gradients."""
OTHER_VECTORS, VECTORS_A_PRODUCT = 30, 2
"""Of the size of the weights, at the peak of a step (measured)."""


@dataclass(frozen=True)
class Budget:
    """Products with H that a hypergradient may take.

    usual: of a training of finite time.
    most:  to a minimum, and for the first few of any training; below 1 where hypergradients do not pay.
    """

    usual: int
    most: int

    @classmethod
    def of(cls, levels: Levels, training: float, share: float, time: Tensor | None, derivatives: int = 1) -> Budget:
        """Within a share of the passes of a training. The first few products after one to a minimum may take as much as
        it did: they are exact enough to be worth several trainings. So may those of many derivatives.

        The others are df/dy and dF/dy at the trained weights, the second length of the first difference, and the two
        gradients of the product with d2f/dxdy. Each is a pass for every draw of a loss that draws.
        """
        draws = levels.draws("lower")
        others = 4 * draws + levels.draws("upper") * levels.count("upper") / levels.count("lower")
        to_a_minimum = time is not None and bool(time.isinf().any())
        few = 1.0 if to_a_minimum else min(1.0, derivatives / WORTH_A_TRAINING)
        # What is left of each share is for products: a difference takes a gradient of f.
        usual, most, enough = ((s * training - others) // draws for s in (share, max(share, MOST_SHARE), few))
        return cls(int(usual), int(max(most, min(FEW_PRODUCTS, enough))))

    @property
    def unfinished(self) -> int:
        return min(UNFINISHED_PRODUCTS, max(self.usual, min(FEW_PRODUCTS, self.most)))

    def within(self, memory: float | None, weights: Tensor) -> Budget:
        """As many of them as so many bytes hold, beside the other vectors of the size of the weights."""
        if memory is None or weights.device.type != "cpu":
            return self
        vectors = memory / (weights.numel() * weights.element_size())
        fit = int(max(0.0, vectors - OTHER_VECTORS) / VECTORS_A_PRODUCT)
        return Budget(min(self.usual, fit), min(self.most, fit))


@dataclass(frozen=True)
class LagrangianPoint:
    """How trained weights y_i answer to x, and where that leaves the Lagrangian F + m f at fixed x.

    hypergradient: in the unit cube.
    multiplier:    m, at which F, linearised, falls by `decrease` from y_i to the minimiser y_m.
    decrease:      how far F at y_m lies below F at the trained weights, relative to |F| there.
    drowned:       entries of the gradient that are less than their error, shape (d,): F depends on x directly there,
        and nearly cancels what it changes through the weights.
    """

    hypergradient: Hypergradient
    multiplier: float
    decrease: float
    drowned: Tensor

    @property
    def gradient(self) -> Tensor:
        """Of the hypergradient, shape (d,)."""
        return self.hypergradient.gradient

    @property
    def known(self) -> Tensor:
        """The same, NaN where it is drowned."""
        return self.gradient.masked_fill(self.drowned, math.nan)


def lagrangian_point(point: TrainedPoint, decrease: float, budget: Budget) -> LagrangianPoint:
    """The hypergradient at a trained point, from products with H = d2f/dy2, and one with d2f/dxdy.

    At the minimiser y_m of F + m f the envelope theorem gives d/dx (F + m (f - v)) = dF/dx + m (df/dx(x, y_m) - dv/dx).
    As m grows that tends to dF/dx - d2f/dxdy q, with q = H^-1 dF/dy if the training ended at a minimum. If it did not,
    q is the response of the training (`response`).
    """
    upper = point.upper
    if not upper.in_y.any():  # F does not depend on y
        return unmoved(Hypergradient(upper.in_x, upper.value))
    found = response(point, budget)
    if not found.vector.any():  # f is flat along all that F follows
        return unmoved(Hypergradient(upper.in_x, upper.value, products=found.products))
    indirect = point.products.mixed(found.vector)
    gradient = upper.in_x - indirect
    share = max(found.residual, ERROR_OF_UNFINISHED if point.finite else ERROR) + point.products.noise
    error = share * indirect.abs()
    drowned = (upper.in_x != 0) & (gradient.abs() < error)
    if drowned.any():
        say_cancelled(type(point.levels.problem).__name__)
    fall = inner(upper.in_y, found.vector)  # of F, linearised, along y_m - y_i = -q / m, times m
    # F falls by fall / m in all. Choose m so that this is `decrease` |F|.
    multiplier = fall / (decrease * (abs(upper.value) or 1.0))
    hypergradient = checked(
        Hypergradient(
            gradient,
            upper.value,
            error=error.norm().item(),
            iterations=found.products,
            products=found.products + 1,
            residual=found.residual,
        )
    )
    if not fall > 0:  # no multiplier lowers F to first order
        return replace(unmoved(hypergradient), drowned=drowned)
    return LagrangianPoint(hypergradient, multiplier, decrease, drowned)


def unmoved(hypergradient: Hypergradient) -> LagrangianPoint:
    """Where F does not fall from the trained weights, to first order."""
    nothing = torch.zeros_like(hypergradient.gradient, dtype=torch.bool)
    return LagrangianPoint(hypergradient, 0.0, 0.0, nothing)


@lru_cache
def say_cancelled(problem: str) -> None:
    """That some entries of hypergradients are left out, once in a process."""
    logger.warning(
        "%s: what F changes with a hyperparameter directly and what it changes through the weights nearly cancel, to "
        "less than the error of a hypergradient; such entries of it are left out", problem,
    )  # fmt: skip


def response(point: TrainedPoint, budget: Budget) -> Filtered:
    """q, shape (n,): F changes by -<q, d> where a force d pulls at df/dy all through the training.

    A gradient flow that has gone for a time s along an eigenvector of H of curvature h answers with (1 - exp(-s h)) / h
    where a minimum answers with 1 / h. With S the times of all weights and A = S^(1/2) H S^(1/2),

        q = S^(1/2) phi(A) S^(1/2) dF/dy,    phi(h) = 1 / (|h| + 1),

    which is s for h = 0 and 1 / |h| for large ones. Along a negative curvature a flow answers with exp(s |h|), but a
    training does not stay where such a direction could grow, so it is answered as a positive one.

    Where the training ended at a minimum, or if nobody knows, S is infinite (`at_a_minimum`). Curvatures below the
    noise of products are not divided by.

    Raises:
        NoisyError: gradients are so coarse that q is far too short for that.
    """
    force, products = point.upper.in_y, point.products
    if point.time is None or not point.finite:
        found = filtered(
            products.hessian, force, lambda h: at_a_minimum(h, products.noise), FINISHED_TOLERANCE, budget.most
        )
        check_length(products, found, at_a_minimum, found.values)
        return found
    # Both sides scaled, so that the operator is symmetric, as Lanczos needs it.
    root = point.time.sqrt()
    if not (root * force).any():  # no optimizer moves the weights that F depends on
        nothing = torch.zeros(0, dtype=torch.double)
        return Filtered(torch.zeros_like(force), 0.0, 0, nothing, nothing)
    found = filtered(
        lambda v: root * products.hessian(root * v),
        root * force,
        lambda h: after_a_time(h, products.noise),
        UNFINISHED_TOLERANCE,
        budget.unfinished,
    )
    # By as much as a product is noise, an eigenvalue may be lower, and the answer of a finite time longer.
    lower = (found.values.abs() - products.noise * found.values.abs().max()).clamp_min(0.0)
    check_length(products, found, after_a_time, lower)
    return replace(found, vector=root * found.vector)


def check_length(
    products: Differences, found: Filtered, phi: Callable[[Tensor, float], Tensor], possible: Tensor
) -> None:
    """Refuse an answer to which the noise of coarse gradients leaves too little; it may be far too short.

    possible: what the curvatures may be, shape (k,).

    Raises:
        NoisyError: so it is.
    """
    if not products.coarse:
        return
    whole = inner(found.weights, phi(possible, 0.0))
    left = inner(found.weights, phi(found.values, products.noise))
    if left < (1 - MOST_SHORTENED) * whole:
        raise NoisyError(
            f"the lower-level loss is computed in {products.precision}, whose noise makes the hypergradient up to "
            f"{100 * (1 - left / whole):.0f} % too short; compute the losses in float32, and set the problem's autocast"
        )


def after_a_time(h: Tensor, noise: float = 0.0) -> Tensor:
    """phi of curvatures, shape (k,), in units of the time of training: 1 / (|h| + 1), and no more than noise, relative
    to the largest, lets one tell."""
    return 1 / (h.abs() + max(1.0, noise * h.abs().max().item()))


def at_a_minimum(h: Tensor, noise: float = 0.0) -> Tensor:
    """phi of curvatures, shape (k,), for infinite time: 1 / h, and 0 where f is flat (many minimisers), as a training
    from given weights does not answer to x there. Flat is what noise, relative to the largest, cannot tell from it.

    Where one is negative, say -c, this is no minimum: a training that went on for several 1 / c would have left.
    """
    lowest, flat = h.min(), max(FLAT, noise) * h.abs().max()
    if lowest < -flat:
        # As of a finite time s = STAYED / c, with phi(h) = 1 / (|h| + 1 / s).
        return 1 / (h.abs() - lowest / STAYED)
    # Near 1 / h above what is flat, and near 0 well below it. Where all h are 0, tiny keeps it from 0 / 0.
    return h / (h.square() + flat.square()).clamp_min(torch.finfo(h.dtype).tiny)
