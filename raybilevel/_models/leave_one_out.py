"""What a Gaussian process would have said of each value, had it not seen that point."""

from __future__ import annotations

import torch
from torch import Tensor

from raybilevel._models.gaussian_process import FittedGP, exact


def errors(fitted: FittedGP) -> Tensor:
    """Of the values, in units of their standard deviation, shape (n,): each with all rows of its point left out.

    With K the covariance of all rows and I those of a point, the residuals there are (K^-1)_II^-1 (K^-1 (y - m))_I
    (Rasmussen & Williams 2006, eq. 5.12, for blocks); hyperparameters stay those of the fit to all.
    """
    model = fitted.model
    rows, d = model.train_inputs[0], model.dimension
    with exact(), torch.no_grad():
        covariance = model.covar_module(rows).to_dense() + model.likelihood.noise_covar(rows).to_dense()
        factor = torch.linalg.cholesky(covariance)
        precision = torch.cholesky_inverse(factor)
        # A derivative has mean 0: the constant is that of values.
        weights = precision @ (model.train_targets - model.mean_constant * rows[:, d])
    # The rows of a point, its value and its derivatives, have equal x.
    _, place = torch.unique(rows[:, :d], dim=0, return_inverse=True)
    found = []
    for i in (rows[:, d] == 1).nonzero().flatten().tolist():
        block = (place == place[i]).nonzero().flatten()
        residual = torch.linalg.solve(precision[block][:, block], weights[block])
        found.append(residual[block == i])
    return torch.cat(found)
