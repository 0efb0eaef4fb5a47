"""Searches that see a training as a black box; each runs until the objective stops it."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Sequence

import torch

from benchmarks.objective import Objective, generator
from raybilevel.space import sobol_points

START_DESIGN = 10
"""Random or Sobol points before a model is used; the default of Optuna's samplers."""


def random(objective: Objective, seed: int) -> None:
    """Uniform in the unit cube, so logarithmic where the space is."""
    draws = generator(seed)
    while True:
        objective.value(torch.rand(objective.space.dimension, generator=draws, dtype=torch.double))


def given(objective: Objective, seed: int, points: Sequence[Sequence[float]]) -> None:
    """Points of the unit cube, one after the other."""
    for point in points:
        objective.value(torch.tensor(point, dtype=torch.double))


def diagonal(objective: Objective, seed: int) -> None:
    """One shared value for all hyperparameters, spread evenly (scrambled Sobol)."""
    for shared in sobol_points(1, 4096, seed):
        objective.value(shared.expand(objective.space.dimension))


def grid(objective: Objective, seed: int) -> None:
    """A regular grid of about as many points as the budget, bounds included, in random order."""
    dimension = objective.space.dimension
    # 1e-9, since 1000 ** (1 / 3) is 9.999999999999998.
    side = max(2, int(objective.budget ** (1 / dimension) + 1e-9))
    points = torch.cartesian_prod(*[torch.linspace(0, 1, side, dtype=torch.double)] * dimension)
    points = points.reshape(-1, dimension)
    for index in torch.randperm(len(points), generator=generator(seed)):
        objective.value(points[index])


def optuna_tpe(objective: Objective, seed: int) -> None:
    """Optuna's default sampler."""
    _optuna(objective, seed, "TPESampler")


def optuna_gp(objective: Objective, seed: int) -> None:
    """Optuna's Gaussian process sampler (Matern 5/2, log expected improvement)."""
    _optuna(objective, seed, "GPSampler")


def _optuna(objective: Objective, seed: int, sampler: str) -> None:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        study = optuna.create_study(sampler=getattr(optuna.samplers, sampler)(seed=seed))
        while True:
            trial = study.ask()
            point = [trial.suggest_float(name, 0.0, 1.0) for name in objective.space.names]
            study.tell(trial, objective.value(torch.tensor(point, dtype=torch.double)))


def cma_es(objective: Objective, seed: int) -> None:
    """CMA-ES from the centre with a step size of a quarter of the box; the cmaes package."""
    import numpy as np
    from cmaes import CMA  # type: ignore[import-untyped,unused-ignore]

    dimension = objective.space.dimension
    # cmaes has no one-dimensional form: there, the second coordinate means nothing.
    padded = max(2, dimension)
    bounds = np.tile([0.0, 1.0], (padded, 1))
    for restart in itertools.count():
        # Restarts until the objective stops it, each with another seed.
        search = CMA(mean=np.full(padded, 0.5), sigma=0.25, bounds=bounds, seed=seed + 1000 * restart)
        while not search.should_stop():
            asked = [search.ask() for _ in range(search.population_size)]
            told = [(point, objective.value(torch.from_numpy(point[:dimension]))) for point in asked]
            search.tell(told)


def qlogei(objective: Objective, seed: int) -> None:
    """BoTorch's qLogExpectedImprovement on a SingleTaskGP, both with their defaults, after Sobol points."""
    from botorch import fit_gpytorch_mll
    from botorch.acquisition import qLogExpectedImprovement
    from botorch.models import SingleTaskGP
    from botorch.optim import optimize_acqf
    from botorch.sampling import SobolQMCNormalSampler
    from botorch.utils.sampling import manual_seed
    from gpytorch.mlls import ExactMarginalLogLikelihood

    dimension = objective.space.dimension
    x = sobol_points(dimension, min(START_DESIGN, 2 * dimension + 2), seed)
    # BoTorch maximises.
    values = [-objective.value(unit) for unit in x]
    bounds = torch.stack([torch.zeros(dimension), torch.ones(dimension)]).double()
    for number in itertools.count():
        y = torch.tensor(values, dtype=torch.double).unsqueeze(-1)
        # BoTorch draws its starts from torch's global numbers, which are put back.
        with warnings.catch_warnings(), manual_seed(seed + 1000 * number):
            warnings.simplefilter("ignore")
            model = SingleTaskGP(x, y)
            fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
            sampler = SobolQMCNormalSampler(torch.Size([128]), seed=seed)
            acquisition = qLogExpectedImprovement(model, best_f=y.max(), sampler=sampler)
            point, _ = optimize_acqf(
                acquisition, bounds, q=1, num_restarts=4, raw_samples=256, options={"maxiter": 100}
            )
        x = torch.cat([x, point])
        values.append(-objective.value(point[0]))


Peer = Callable[[Objective, int], None]
