"""Ridge regression with one penalty per group of features: closed-form trainings, exact hypergradients.

On the examples of a fold, with inputs X and targets t less their means, H = X'X + diag(a) and a the penalty of each
feature,

    w = H^-1 X't,    dw/da_j = -H^-1 e_j w_j

so that the squared error |r|^2 on the part that is held out, r = X_v w - t_v, has the gradient -2 w_j q_j in a_j, with
H q = X_v' r. Gradients of the folds add up.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.linalg import cho_factor, cho_solve
from torch import Tensor

from raybilevel.sklearn._folds import WIDTH, Array, Fold, FoldLoss, Penalties, as_tensor

Solve = Callable[[Array], Array]


@dataclass(frozen=True)
class Centred:
    """A fold less the means of the part that is trained on, and its Gram matrix: X'X, or XX' where that is smaller."""

    fold: Fold
    gram: Array | None

    @classmethod
    def of(cls, fold: Fold) -> Centred:
        # Without means the intercept is 0: it has no row in H, and no penalty.
        mean, mean_target = fold.inputs.mean(0), fold.targets.mean(0)
        x = fold.inputs - mean
        centred = Fold(x, fold.targets - mean_target, fold.held_out - mean, fold.held_out_targets - mean_target)
        return cls(centred, x.T @ x if x.shape[1] <= x.shape[0] else None)

    def inverse(self, penalty: Array) -> Solve:
        """H^-1, shape (p, k) -> (p, k), at a penalty per feature, shape (p,)."""
        if self.gram is not None:
            factor = cho_factor(self.gram + np.diag(penalty), check_finite=False)
            return lambda rows: np.asarray(cho_solve(factor, rows, check_finite=False))
        x, gain = self.fold.inputs, 1 / penalty[:, None]
        weighted = gain * x.T  # H^-1 = D - D X' (I + X D X')^-1 X D with D = diag(a)^-1 (Woodbury)
        factor = cho_factor(np.eye(len(x)) + x @ weighted, check_finite=False)
        return lambda rows: gain * rows - weighted @ cho_solve(factor, weighted.T @ rows, check_finite=False)


class RidgeFolds(FoldLoss):
    """F is the mean squared error, G = log(F) / 2."""

    def __init__(self, folds: list[Fold], penalties: Penalties) -> None:
        super().__init__(folds, penalties)
        self.centred = [Centred.of(fold) for fold in folds]

    def upper(self, x: Tensor) -> float:
        return self._upper(x)[0]

    def value_and_gradient(self, x: Tensor) -> tuple[float, Tensor]:
        upper, gradient = self._upper(x)
        return math.log(upper) / 2, as_tensor(gradient / (2 * upper))

    def hessian(self, x: Tensor) -> Tensor:
        penalties = self.penalties.at(x)
        penalty, d = penalties[self.penalties.group], len(penalties)
        member = self.penalties.group[:, None] == np.arange(d)
        squares, outer = 0.0, np.zeros((d, d))
        for centred in self.centred:
            fold, inverse = centred.fold, centred.inverse(penalty)
            weights = inverse(fold.inputs.T @ fold.targets)
            residual = fold.held_out @ weights - fold.held_out_targets
            squares += np.square(residual).sum()
            for w in weights.T:  # one target after the other
                # X_v dw/dx: H dw/dx = -WIDTH a w on the features of a group, as da/dx = WIDTH a.
                change = -WIDTH * fold.held_out @ inverse(member * (penalty * w)[:, None])
                outer += change.T @ change
        upper = max(squares / self.examples, np.finfo(float).tiny)
        _, gradient = self._upper(x)
        # G = log(F) / 2, so G'' = F'' / (2 F) - F' F' / (2 F^2), with 2 J'J / n for F''.
        hessian = 2 * outer / self.examples / (2 * upper) - np.outer(gradient, gradient) / (2 * upper**2)
        return as_tensor(hessian)

    def _upper(self, x: Tensor) -> tuple[float, Array]:
        penalties = self.penalties.at(x)
        penalty = penalties[self.penalties.group]
        squares, slope = 0.0, np.zeros_like(penalty)
        for centred in self.centred:
            fold, inverse = centred.fold, centred.inverse(penalty)
            weights = inverse(fold.inputs.T @ fold.targets)
            residual = fold.held_out @ weights - fold.held_out_targets
            squares += np.square(residual).sum()
            slope -= 2 * (weights * inverse(fold.held_out.T @ residual)).sum(1)
        gradient = WIDTH * penalties * self.penalties.by_group(slope) / self.examples
        return max(squares / self.examples, np.finfo(float).tiny), gradient


def fit_ridge(inputs: Array, targets: Array, penalty: Array) -> tuple[Array, Array]:
    """Weights, (p, m), and intercepts, (m,), at a penalty per feature, shape (p,)."""
    centred = Centred.of(Fold(inputs, targets, inputs, targets))
    weights = centred.inverse(penalty)(centred.fold.inputs.T @ centred.fold.targets)
    return weights, targets.mean(0) - inputs.mean(0) @ weights
