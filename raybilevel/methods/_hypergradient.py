"""Descents along hypergradients: a trial is a whole bilevel descent from its own start, and nothing is modelled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from raybilevel.hypergradient import DescentSettings
from raybilevel.methods._base import Method
from raybilevel.search_state import SearchState
from raybilevel.space import Space, sobol_points

BOX_STARTS, MODULE_STARTS = 256, 512
"""As many as any budget asks for; those in a box are saved with the search, d numbers each."""


@dataclass(frozen=True)
# In this order: `check` is that of the settings.
class HypergradientDescent(DescentSettings, Method):
    """Several starts, each the start of a descent with these settings, which is a trial; no upper-level steps."""

    most_hyperparameters: ClassVar[int | None] = None

    @property
    def descent(self) -> DescentSettings:
        return self

    def start_design(self, space: Space, slots: int, seed: int) -> Tensor:
        """Where descents start. In a box: its centre, then scrambled Sobol points. Of a module: starts 0, 1, 2, ..."""
        if space.of_starts:
            return torch.stack([space.encode({"start": float(number)}) for number in range(MODULE_STARTS)])
        centre = torch.full((1, space.dimension), 0.5, dtype=torch.double)
        return torch.cat([centre, sobol_points(space.dimension, BOX_STARTS - 1, seed)])

    def exhausted(self, state: SearchState) -> bool:
        # The start design is all that it has.
        return True
