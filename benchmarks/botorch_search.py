"""BoTorch with its defaults as a searcher of Tune: what a Gaussian process finds by values."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from botorch import fit_gpytorch_mll
from botorch.acquisition import LogExpectedImprovement
from botorch.models import SingleTaskGP
from botorch.utils.sampling import manual_seed
from gpytorch.mlls import ExactMarginalLogLikelihood
from ray.tune.search import Searcher
from torch import Tensor

from benchmarks.peers import START_DESIGN
from raybilevel._models.acquisition import maximise
from raybilevel.space import Space, sobol_points
from raybilevel.tune._domains import split_param_space


class BoTorchSearch(Searcher):  # type: ignore[misc]
    """Log expected improvement on a `SingleTaskGP`, after Sobol points. Choices are numbers to it.

    The coordinates, and the maximiser over whole numbers and choices, are raybilevel's. One trial at a time.
    `MixedSingleTaskGP` took ten times as long to fit.
    """

    def __init__(self, seed: int = 0, metric: str | None = None, mode: str | None = None) -> None:
        super().__init__(metric=metric, mode=mode)
        self.seed = seed
        self._metric: str | None = metric
        self.space: Space | None = None
        self.asked: dict[str, Tensor] = {}
        self.told: dict[str, float] = {}

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        self._metric, self.space = metric, split_param_space(config)[0]
        return mode == "min"

    def suggest(self, trial_id: str) -> dict[str, Any]:
        assert self.space is not None  # Tune has told it
        self.asked[trial_id] = self.space.rounded(self.point(self.space))
        return self.space.to_config(self.asked[trial_id])

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if result is not None and not error:
            assert self._metric is not None
            self.told[trial_id] = result[self._metric]

    def point(self, space: Space) -> Tensor:
        number, first = len(self.asked), min(START_DESIGN, 2 * space.dimension + 2)
        if number < first or len(self.told) < 2:
            return sobol_points(space.dimension, number + 1, self.seed)[number]
        x = torch.stack([self.asked[trial] for trial in self.told])
        values = -torch.tensor([[value] for value in self.told.values()], dtype=torch.double)  # BoTorch maximises
        with warnings.catch_warnings(), manual_seed(self.seed + 1000 * number):
            warnings.simplefilter("ignore")
            model = SingleTaskGP(x, values)
            fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
            acquisition = LogExpectedImprovement(model, best_f=values.max())
            low, high = torch.zeros(space.dimension).double(), torch.ones(space.dimension).double()
            best = x[values.argmax()]
            return maximise(acquisition, low, high, [best], self.seed + number, discrete=space.discrete)

    # Of a benchmark's run nothing is restored.
    def save(self, checkpoint_path: str) -> None: ...

    def restore(self, checkpoint_path: str) -> None: ...
