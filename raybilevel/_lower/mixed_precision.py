"""Mixed precision: the steps of a training run under autocast. F, f and hypergradients are taken outside of it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from raybilevel.errors import ProblemError
from raybilevel.problem import BilevelProblem


class MixedPrecision:
    """Autocast of one training run, with a scaler of its gradients where they are taken in float16.

    Without `BilevelProblem.autocast` it changes nothing.

    Raises:
        ProblemError: gradients would be scaled for L-BFGS, which asks for several a step.
    """

    def __init__(self, problem: BilevelProblem, optimizer: Optimizer) -> None:
        self.device, self.dtype = torch.device(problem.device).type, problem.autocast
        # bfloat16 has the range of float32, so its gradients need no scale.
        self.scaler = GradScaler(self.device, enabled=self.dtype == torch.float16)
        if self.scaler.is_enabled() and isinstance(optimizer, torch.optim.LBFGS):
            raise ProblemError(
                f"{type(problem).__name__}.autocast: torch.float16 scales gradients, which L-BFGS cannot do with; use "
                "torch.bfloat16, or another optimizer"
            )

    def autocast(self) -> AbstractContextManager[object]:
        """Where the loss of a step belongs."""
        return nullcontext() if self.dtype is None else torch.autocast(self.device, self.dtype)

    def step(self, optimizer: Optimizer) -> bool:
        """A step of the optimizer by gradients that are scaled; False if they overflowed and it was left out."""
        scale = self.scaler.get_scale()
        self.scaler.step(optimizer)
        self.scaler.update()
        return self.scaler.get_scale() >= scale
