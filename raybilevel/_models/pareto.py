"""Several objectives: the trainings that nothing beats in all of them, and where to find more."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from botorch.acquisition.multi_objective import logei
from botorch.acquisition.multi_objective.logei import qLogNoisyExpectedHypervolumeImprovement
from botorch.acquisition.multi_objective.objective import WeightedMCMultiOutputObjective
from botorch.models import ModelListGP
from botorch.sampling import SobolQMCNormalSampler
from botorch.utils.multi_objective import infer_reference_point, is_non_dominated
from linear_operator.utils.warnings import NumericalWarning
from torch import Tensor

from raybilevel._models.acquisition import Factor, UpperModel, fit_upper_model, maximise
from raybilevel._models.discrete import NONE, AtRest, Levels, all_active
from raybilevel.search_state import SearchState, Training

SAMPLES = 64
"""Of the posterior, from a Sobol sequence."""


def objectives(training: Training) -> tuple[float, ...]:
    """F and the others, each to be minimised."""
    return (training.upper_loss, *training.others)


def front(state: SearchState) -> tuple[Training, ...]:
    """The Pareto front, by F: of the trainings that ran to their end, those that no other beats in one objective and
    equals in the rest. Of trainings that keep the constraints, if any does; of one where two are equal in all.
    """
    feasible = [t for t in state.done if t.feasible] or list(state.done)
    if not feasible:
        return ()
    values = torch.tensor([objectives(t) for t in feasible], dtype=torch.double)
    chosen = is_non_dominated(-values, deduplicate=True).tolist()
    found = [t for t, keep in zip(feasible, chosen, strict=True) if keep]
    return tuple(sorted(found, key=objectives))


def newest_of_front(state: SearchState, claimed: Collection[int]) -> tuple[int, ...]:
    """The index of the training of the front that ended last; none if its hypergradient is known or claimed."""
    newest = max(front(state), key=lambda t: t.finished)
    return () if newest.hypergradient is not None or newest.index in claimed else (newest.index,)


@contextmanager
def nothing_compiled() -> Iterator[None]:
    """Else BoTorch 0.18 would compile a kernel into the home folder where an acquisition is first made. That takes a
    compiler and half a minute, and is for one processor, while nodes of a cluster may share the folder. A step takes a
    second without."""
    # Versions before that have no such flag.
    before = getattr(logei, "_load_attempted", True)
    logei._load_attempted = True
    try:
        yield
    finally:
        logei._load_attempted = before


class WeightedHypervolume(qLogNoisyExpectedHypervolumeImprovement):  # type: ignore[misc]
    """Its logarithm plus those of some factors."""

    factors: Sequence[Factor] = ()

    def forward(self, X: Tensor) -> Tensor:
        improvement: Tensor = super().forward(X)
        for factor in self.factors:
            improvement = improvement + factor(X[..., 0, :])
        return improvement


@dataclass(frozen=True)
class FrontModel:
    """A model of each objective, F first.

    known: points of the unit cube with all objectives measured, shape (n, d).
    seen:  these in the units of the models, shape (n, objectives).
    pending: points that are trained or will be, shape (m, d).
    """

    models: tuple[UpperModel, ...]
    known: Tensor
    seen: Tensor
    pending: Tensor

    @classmethod
    def of(
        cls,
        state: SearchState,
        upper: UpperModel,
        pending: Sequence[Tensor],
        near: Tensor,
        max_rows: int,
        unordered: Sequence[int] = (),
    ) -> FrontModel | None:
        """None of a search of one objective.

        upper: the model of F, with no pending points in it. The others are modelled in the same way, by values.
        """
        if not state.others:
            return None
        whole = [t for t in state.measured if all(map(math.isfinite, t.others)) and len(t.others) == state.others]
        models = [upper]
        for number in range(state.others):
            # As if it were F, of which hypergradients are not those of another metric.
            by_values = [replace(t, upper_loss=t.others[number], hypergradient=None) for t in whole]
            models.append(fit_upper_model(by_values, [], near, max_rows, unordered))
        # Without a feasible training all count: the search looks for one first.
        measured = [t for t in whole if t.feasible] or whole
        columns = []
        for number, model in enumerate(models):
            values = torch.tensor([objectives(t)[number] for t in measured], dtype=torch.double)
            columns.append((model.warp(values) - model.process.shift) / model.process.scale)
        known = torch.tensor([t.unit for t in measured], dtype=torch.double)
        waiting = torch.stack(list(pending)) if pending else torch.empty(0, len(near), dtype=torch.double)
        return cls(tuple(models), known, torch.stack(columns, -1), waiting)

    def acquisition(self, seed: int, factors: Sequence[Factor] = ()) -> WeightedHypervolume:
        """The expected growth of the volume that the front dominates, where all is noisy: qLogNEHVI (Daulton et al.
        2021, arXiv:2105.08195; Ament et al. 2023, arXiv:2310.20708)."""
        signs = -torch.ones(len(self.models), dtype=torch.double)
        options: dict[str, Any] = {"X_pending": self.pending} if len(self.pending) else {}
        best = -self.seen[is_non_dominated(-self.seen)]
        with nothing_compiled():
            found = WeightedHypervolume(
                model=ModelListGP(*(model.process.model for model in self.models)),
                ref_point=infer_reference_point(best),
                X_baseline=self.known,
                sampler=SobolQMCNormalSampler(torch.Size([SAMPLES]), seed=seed),
                objective=WeightedMCMultiOutputObjective(signs),
                prune_baseline=True,
                cache_root=False,
                **options,
            )
        found.factors = factors
        return found

    def propose(
        self,
        seed: int,
        discrete: Levels = NONE,
        at_rest: AtRest = all_active,
        factors: Sequence[Factor] = (),
    ) -> Tensor:
        """The point of the unit cube from which the front is expected to gain most, shape (d,)."""
        d = self.known.shape[-1]
        low, high = torch.zeros(d, dtype=torch.double), torch.ones(d, dtype=torch.double)
        # From the points of the front: its neighbourhood is where it grows.
        starts = list(self.known[is_non_dominated(-self.seen)])
        spread = starts[:: max(1, len(starts) // 3)][:3]
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # Of points close to each other, whose joint posterior is nearly singular.
            warnings.simplefilter("ignore", NumericalWarning)
            torch.manual_seed(seed)
            acquisition = self.acquisition(seed, factors)
            return maximise(acquisition, low, high, spread, seed, 3, discrete, at_rest)
