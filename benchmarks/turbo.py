"""TuRBO-1 (Eriksson et al. 2019, arXiv:1910.01739): a Gaussian process and Thompson samples within one trust region.

One evaluation at a time, with the constants of the paper and BoTorch's process and sampling.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from botorch import fit_gpytorch_mll
from botorch.generation import MaxPosteriorSampling
from botorch.models import SingleTaskGP
from botorch.utils.sampling import manual_seed
from gpytorch.constraints import Interval
from gpytorch.kernels import MaternKernel, ScaleKernel
from gpytorch.mlls import ExactMarginalLogLikelihood
from torch import Tensor

from benchmarks.objective import Objective, generator
from benchmarks.peers import START_DESIGN
from raybilevel.space import sobol_points

FIRST_LENGTH, LEAST_LENGTH, LARGEST_LENGTH = 0.8, 0.5**7, 1.6
"""Side of the region, in the unit cube, before it is scaled by the length scales. Below the least it begins anew."""
SUCCESSES = 3
"""In a row, after which the side doubles. As many failures as there are coordinates (at least 4) halve it."""
BETTER = 1e-3
"""Relative decrease that is a success."""
MOST_CANDIDATES = 5000
PERTURBED = 20
"""Coordinates of a candidate that differ from the centre, in the mean."""


@dataclass(frozen=True)
class Region:
    """Side of the trust region, and how often in a row it was a success or a failure."""

    length: float = FIRST_LENGTH
    successes: int = 0
    failures: int = 0

    def after(self, success: bool, dimension: int) -> Region:
        successes, failures = (self.successes + 1, 0) if success else (0, self.failures + 1)
        if successes == SUCCESSES:
            return Region(min(2 * self.length, LARGEST_LENGTH))
        if failures == max(4, dimension):
            return Region(self.length / 2)
        return Region(self.length, successes, failures)


def candidates(centre: Tensor, lengths: Tensor, side: float, seed: int) -> Tensor:
    """Points of the region around its centre, shape (n, d), each equal to the centre in most of many coordinates.

    lengths: of the kernel, shape (d,), by whose ratios the sides differ; their product is that of the cube.
    """
    dimension = len(centre)
    sides = side * lengths / lengths.log().mean().exp()
    low, high = (centre - sides / 2).clamp(0, 1), (centre + sides / 2).clamp(0, 1)
    count = min(MOST_CANDIDATES, max(2000, 200 * dimension))
    points = low + sobol_points(dimension, count, seed) * (high - low)
    draws = generator(seed)
    moved = torch.rand(count, dimension, generator=draws) <= min(1.0, PERTURBED / dimension)
    # One at least, or the candidate is the centre.
    moved[torch.arange(count), torch.randint(dimension, (count,), generator=draws)] = True
    return torch.where(moved, points, centre)


def sampled(x: Tensor, values: Tensor, side: float, seed: int) -> Tensor:
    """The candidate at which a draw of the posterior is least, shape (d,)."""
    dimension = x.shape[1]
    z = (values.mean() - values) / values.std().clamp_min(1e-12)  # BoTorch maximises
    kernel = ScaleKernel(MaternKernel(nu=2.5, ard_num_dims=dimension, lengthscale_constraint=Interval(0.005, 4.0)))
    with warnings.catch_warnings(), manual_seed(seed):
        warnings.simplefilter("ignore")
        model = SingleTaskGP(x, z.unsqueeze(-1), covar_module=kernel, outcome_transform=None)
        fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
        lengths = kernel.base_kernel.lengthscale.detach().flatten()
        found: Tensor = MaxPosteriorSampling(model, replacement=False)(
            candidates(x[z.argmax()], lengths, side, seed), num_samples=1
        )
    return found[0]


def turbo(objective: Objective, seed: int) -> None:
    """From Sobol points; when a region has collapsed, from others."""
    dimension = objective.space.dimension
    number = 0
    while True:
        x = sobol_points(dimension, START_DESIGN, seed + 1000 * number)
        values = torch.tensor([objective.value(unit) for unit in x], dtype=torch.double)
        region = Region()
        while region.length >= LEAST_LENGTH:
            number += 1
            unit = sampled(x, values, region.length, seed + 1000 * number)
            value, best = objective.value(unit), values.min().item()
            region = region.after(value < best - BETTER * abs(best), dimension)
            x, values = torch.cat([x, unit.unsqueeze(0)]), torch.cat([values, values.new_tensor([value])])
