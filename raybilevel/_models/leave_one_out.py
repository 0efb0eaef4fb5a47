"""What a Gaussian process would have said of each value, had it not seen that point."""

from __future__ import annotations

import torch
from torch import Tensor

from raybilevel._models.gaussian_process import FittedGP


def errors(fitted: FittedGP) -> Tensor:
    """Of the values, in units of their standard deviation, shape (n,): each with all rows of its point left out.

    With K the covariance of all rows and I those of a point, the residuals there are (K^-1)_II^-1 (K^-1 (y - m))_I
    (Rasmussen & Williams 2006, eq. 5.12, for blocks); hyperparameters stay those of the fit to all.
    """
    known = fitted.model.conditioned
    found = []
    for i in (known.is_value == 1).nonzero().flatten().tolist():
        # The rows of a point, its value and its derivatives, have equal x.
        block = (known.place == known.place[i]).nonzero().flatten()
        whitened = known.whitening[:, block]
        # (K^-1)_II, with K^-1 = W'W.
        residual = torch.linalg.solve(whitened.T @ whitened, known.weights[block])
        found.append(residual[block == i])
    return torch.cat(found)
