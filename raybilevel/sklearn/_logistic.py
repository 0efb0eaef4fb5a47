"""Logistic regression with one penalty per group of features: trainings by Newton's method, hypergradients by
implicit derivatives.

With weights W, (p, k), intercepts b, and P the probabilities of k of the classes (of two, k = 1: the other's logit is
0), a fold's training minimises -sum log p(t) + sum_j a_j |W_j|^2 / 2. With H its Hessian, the loss F on the part that
is held out has the gradient -W_j . Q_j in a_j, with H Q = dF/dW.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.linalg import cho_factor, cho_solve
from scipy.sparse.linalg import LinearOperator, cg
from torch import Tensor

from raybilevel.sklearn._folds import WIDTH, Array, Fold, FoldLoss, Penalties, as_tensor

TOLERANCE = 1e-12
"""Of a training, by half its Newton decrement, relative to the loss; of linear systems, by the residual's square."""
NEWTON_STEPS = 100
STEP_TOLERANCE = 1e-2
"""Of the linear system of a Newton step."""
INTERCEPT = 1e-8
"""A penalty on intercepts, which of several classes are determined up to a constant."""


@dataclass(frozen=True)
class Curvature:
    """H, the Hessian of a training.

    inputs:        with a column of ones, (n, p + 1).
    probabilities: of k classes, (n, k).
    penalty:       of each column, (p + 1,).
    """

    inputs: Array
    probabilities: Array
    penalty: Array

    def within_classes(self, right: Array) -> Array:
        """The blocks within classes, inverted: (p + 1, k, ...) -> the same. Of two classes it is H^-1."""
        solved = [cho_solve(f, right[:, c], check_finite=False) for c, f in enumerate(self._factors)]
        return np.stack(solved, 1)

    def inverse(self, right: Array, tolerance: float = TOLERANCE**0.5) -> Array:
        """H^-1, (p + 1, k) -> the same, by conjugate gradients with those blocks."""
        if right.shape[1] == 1:
            return self.within_classes(right)
        size = (right.size, right.size)
        near = LinearOperator(size, lambda v: self.within_classes(v.reshape(right.shape)).ravel(), dtype=float)
        whole = LinearOperator(size, lambda v: self.product(v.reshape(right.shape)).ravel(), dtype=float)
        found, _ = cg(whole, right.ravel(), rtol=tolerance, maxiter=200, M=near)
        return np.asarray(found.reshape(right.shape))

    def product(self, rows: Array) -> Array:
        """H times (p + 1, k)."""
        # (diag(p) - p p') times the logits of each example, p its probabilities.
        moved = self.probabilities * (self.inputs @ rows)
        moved -= self.probabilities * moved.sum(1, keepdims=True)
        return np.asarray(self.inputs.T @ moved + self.penalty[:, None] * rows)

    @cached_property
    def _factors(self) -> list[tuple[Array, bool]]:
        spread = self.probabilities * (1 - self.probabilities)
        return [
            cho_factor((self.inputs * of_class[:, None]).T @ self.inputs + np.diag(self.penalty), check_finite=False)
            for of_class in spread.T
        ]


def train(inputs: Array, targets: Array, penalty: Array) -> tuple[Array, Curvature]:
    """Weights and intercepts, (p + 1, k), by Newton's method from 0; and the curvature there.

    targets: 1 for the class of an example, (n, k).
    penalty: of each feature, (p,).
    """
    inputs, penalty = with_ones(inputs), np.append(penalty, INTERCEPT)
    weights = np.zeros((inputs.shape[1], targets.shape[1]))

    def loss(weights: Array) -> tuple[float, Array]:
        value, slope = cross_entropy(inputs @ weights, targets)
        penalised = penalty[:, None] * weights
        return value + (penalised * weights).sum() / 2, inputs.T @ slope + penalised

    value, gradient = loss(weights)
    for _ in range(NEWTON_STEPS):
        curvature = Curvature(inputs, probabilities(inputs @ weights), penalty)
        step = curvature.inverse(gradient, STEP_TOLERANCE)
        decrement, length = (gradient * step).sum(), 1.0
        # Before the step, so that the curvature is that at the weights which are returned.
        if decrement <= TOLERANCE * value:
            break
        # Armijo's condition: the decrement is the slope along the step.
        while loss(weights - length * step)[0] > value - 1e-4 * length * decrement and length > 1e-6:
            length /= 2
        weights = weights - length * step
        value, gradient = loss(weights)
    return weights, curvature


class LogisticFolds(FoldLoss):
    """F = G is the mean negative log-likelihood."""

    def __init__(self, folds: list[Fold], penalties: Penalties) -> None:
        super().__init__(folds, penalties)
        self.examples = sum(len(fold.held_out) for fold in folds)

    def upper(self, x: Tensor) -> float:
        penalty = self.penalties.at(x)[self.penalties.group]
        return sum(held_out_loss(fold, train(fold.inputs, fold.targets, penalty)[0])[0] for fold in self.folds) / (
            self.examples
        )

    def value_and_gradient(self, x: Tensor) -> tuple[float, Tensor]:
        penalties = self.penalties.at(x)
        penalty = penalties[self.penalties.group]
        loss, slope = 0.0, np.zeros_like(penalty)
        for fold in self.folds:
            weights, curvature = train(fold.inputs, fold.targets, penalty)
            value, in_weights = held_out_loss(fold, weights)
            loss += value
            # Without the last row: the penalty on intercepts is no hyperparameter.
            slope -= (weights * curvature.inverse(in_weights)).sum(1)[:-1]
        gradient = WIDTH * penalties * self.penalties.by_group(slope) / self.examples
        return loss / self.examples, as_tensor(gradient)

    def hessian(self, x: Tensor) -> Tensor:
        """By Gauss and Newton, with the blocks of H within classes alone."""
        penalties = self.penalties.at(x)
        penalty, d = penalties[self.penalties.group], len(penalties)
        # A row of zeros for the intercept, which belongs to no group.
        member = np.vstack([self.penalties.group[:, None] == np.arange(d), np.zeros((1, d), bool)])
        hessian = np.zeros((d, d))
        for fold in self.folds:
            weights, curvature = train(fold.inputs, fold.targets, penalty)
            held_out = with_ones(fold.held_out)
            # H dW/dx = -WIDTH a W on the rows of a group, as da/dx = WIDTH a.
            moved = curvature.penalty[:, None] * weights
            change = -WIDTH * curvature.within_classes(moved[:, :, None] * member[:, None, :])  # (p + 1, k, d)
            logits = np.einsum("np,pkd->nkd", held_out, change, optimize=True)
            # Of each example, l' (diag(p) - p p') l with l the change of its logits.
            p = probabilities(held_out @ weights)
            mean = np.einsum("nk,nkd->nd", p, logits)
            hessian += np.einsum("nk,nkd,nke->de", p, logits, logits, optimize=True) - mean.T @ mean
        return as_tensor(hessian / self.examples)


def held_out_loss(fold: Fold, weights: Array) -> tuple[float, Array]:
    """The sum over the examples that are held out, and its gradient in the weights."""
    held_out = with_ones(fold.held_out)
    value, slope = cross_entropy(held_out @ weights, fold.held_out_targets)
    return value, held_out.T @ slope


def with_ones(inputs: Array) -> Array:
    return np.hstack([inputs, np.ones((len(inputs), 1))])


def all_logits(logits: Array) -> Array:
    """With the 0 of the other class, where there are two: (n, k) -> (n, classes)."""
    return np.hstack([np.zeros_like(logits), logits]) if logits.shape[1] == 1 else logits


def log_sum(logits: Array) -> Array:
    """log sum exp over the classes, (n,)."""
    return np.asarray(np.logaddexp.reduce(all_logits(logits), axis=1))


def probabilities(logits: Array) -> Array:
    """Of the classes that have logits, (n, k)."""
    return np.asarray(np.exp(logits - log_sum(logits)[:, None]))


def cross_entropy(logits: Array, targets: Array) -> tuple[float, Array]:
    """The sum over examples, and its gradient, (n, k)."""
    value = (log_sum(logits) - (logits * targets).sum(1)).sum()
    return float(value), probabilities(logits) - targets


def fit_logistic(inputs: Array, targets: Array, penalty: Array) -> tuple[Array, Array]:
    """Weights, (p, k), and intercepts, (k,), at a penalty per feature, shape (p,)."""
    weights, _ = train(inputs, targets, penalty)
    return weights[:-1], weights[-1]
