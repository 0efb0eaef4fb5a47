"""The published scheme (A. Sinha, S. Gunwal, S. Kumar, arXiv:2208.12118), as the reference to compare with."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raybilevel._descents.augmented_lagrangian import Equality, MultiplierState
from raybilevel._lower.functions import finite
from raybilevel._lower.levels import Levels
from raybilevel._lower.variables import BoxVariables, trainable
from raybilevel._models.value_function import ValueFunction, fit_value_function
from raybilevel.errors import ConfigError, NotFiniteError
from raybilevel.methods._base import LoadCheckpoint, Method, StepMethod, UpperResult, UpperStep
from raybilevel.problem import Batch, BilevelProblem, Level, make_batches, make_model, move
from raybilevel.search_state import Proposal, SearchState, StepRecord, Training
from raybilevel.space import Space, sobol_points

SOBOL_POINTS = 25
"""Start design for more than two hyperparameters, for which the paper gives none."""


@dataclass(frozen=True)
class Paper(Method):
    """Five outer iterations of an augmented Lagrangian descent in (x, y), with c = f - v_hat as an equality.

    Each descent takes `steps` mini-batch steps with momentum on L = F + (r/2) c^2 + mu c jointly in x (logarithms for
    a logarithmic scale) and y, the gradient of each tensor clipped to norm `clip`, from the last iterate; the first
    starts at the design point with the lowest F and its weights. Then mu <- mu + r c, with c over all data and v_hat
    as it was, and r <- 1.5 r; the new x is trained (cold) and v_hat, a GP on values only, refitted. The result is
    the iterate with the smallest |c|.

    learning_rates, momenta: before the first descent each pair is tried from the start point, and the one with the
        lowest L is kept. The trials are charged.

    Two departures: x is kept in its box, and weights are not chained from one training to the next (the authors' code
    starts a lower-level training from the last descent's weights, which have seen validation data).
    """

    iterations: int = 5
    steps: int = 300
    multiplier: float = 2.0
    penalty: float = 2.0
    growth: float = 1.5
    clip: float = 2.0
    learning_rates: tuple[float, ...] = (0.001, 0.01, 0.05, 0.07, 0.1)
    momenta: tuple[float, ...] = (0.1, 0.5, 0.8, 0.9, 0.99)

    def __post_init__(self) -> None:
        for name in ("iterations", "steps", "penalty", "growth", "clip"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}")
        if not self.learning_rates or not self.momenta:
            raise ConfigError("learning_rates and momenta must each have at least one entry")

    @property
    def upper_steps(self) -> StepMethod:
        return self

    def start_design(self, space: Space, slots: int, seed: int) -> Tensor:
        """A regular grid of 5 points for one hyperparameter, 5 x 5 for two."""
        if space.dimension > 2:
            return sobol_points(space.dimension, SOBOL_POINTS, seed)
        ticks = torch.linspace(0, 1, 5, dtype=torch.double)
        return torch.cartesian_prod(*[ticks] * space.dimension).reshape(-1, space.dimension)

    def plan(self, state: SearchState, running: tuple[UpperStep, ...], slots: int, seed: int) -> UpperStep | None:
        if not state.done or state.pending or running or len(state.steps) >= self.iterations:
            return None
        # Of the design: its own iterates are of origin "region".
        start = min((t for t in state.done if t.proposal.origin != "region"), key=lambda t: t.upper_loss)
        # A step that failed left no iterate to begin from.
        first = not any(step.multiplier is not None for step in state.steps)
        return UpperStep(
            number=len(state.steps),
            origin="region",
            centre=start.index,
            state=state,
            seed=seed + 1000 * len(state.steps),
            targets=(start.index,) if first else (),
        )

    def converged(self, state: SearchState) -> bool:
        return self.exhausted(state)

    def exhausted(self, state: SearchState) -> bool:
        return len(state.steps) >= self.iterations

    def incumbent(self, state: SearchState) -> Training | None:
        """The trained iterate with the smallest |c|; before there is one, the lowest F."""
        iterates = [t for t in state.done if t.proposal.violation is not None]
        return min(iterates, key=lambda t: t.proposal.violation or 0.0) if iterates else state.best

    def run(
        self,
        problem: BilevelProblem,
        space: Space,
        constants: Mapping[str, Any],
        step: UpperStep,
        load: LoadCheckpoint,
        memory: bytes | None = None,
    ) -> UpperResult:
        variables = BoxVariables(space, constants)
        if memory is None:
            weights = load(step.centre)["model"]
            unit = torch.tensor(step.state.trainings[step.centre].unit, dtype=torch.double)
        else:
            saved = torch.load(io.BytesIO(memory), weights_only=True)
            weights, unit = saved["model"], saved["unit"]
        config = variables.config(unit)
        model = make_model(problem, config)
        model.load_state_dict(weights)
        descent = PaperDescent(self, Levels(problem, model, variables, config), space, step.seed)
        descent.place(unit)
        # As published: values only, and all of them.
        value_function = fit_value_function(step.state.done, descent.unit, False, 10**6)
        schedule = [s for s in step.state.steps if s.multiplier is not None and s.penalty is not None]
        state = MultiplierState(self.multiplier, self.penalty)
        if schedule:
            state = MultiplierState(schedule[-1].multiplier or 0.0, schedule[-1].penalty or 0.0)
        rate, momentum = (schedule[-1].rate, schedule[-1].momentum) if schedule else (None, None)
        if rate is None or momentum is None:
            rate, momentum = descent.tune(state, value_function)
        descent.descend(state, value_function, rate, momentum)
        constraint = descent.constraint(value_function)
        state = Equality(self.growth).update(state, constraint)
        buffer = io.BytesIO()
        torch.save({"model": model.state_dict(), "unit": descent.unit}, buffer)
        record = StepRecord(
            step.number,
            step.centre,
            descent.levels.passes,
            multiplier=state.multiplier,
            penalty=state.penalty,
            violation=state.violation,
            rate=rate,
            momentum=momentum,
        )
        proposal = Proposal(
            tuple(descent.unit.tolist()),
            "region",
            predicted_value=value_function.mean(descent.unit).item(),
            deviation=value_function.deviation(descent.unit).item(),
            violation=state.violation,
        )
        return UpperResult(record, proposal, memory=buffer.getvalue())


class PaperDescent:
    """Mini-batch momentum steps in (x, y); `x` holds the search coordinates: logarithms for a logarithmic scale."""

    def __init__(self, method: Paper, levels: Levels, space: Space, seed: int) -> None:
        self.method, self.levels = method, levels
        self.width = torch.tensor([p.width for p in space.parameters], dtype=torch.double)
        self.weights = trainable(levels.model)
        self.generator = torch.Generator().manual_seed(seed)
        self.x = torch.zeros(space.dimension, dtype=torch.double, requires_grad=True)

    @property
    def unit(self) -> Tensor:
        """x in the unit cube, shape (d,)."""
        return (self.x.detach() / self.width).clamp(0, 1)

    def place(self, unit: Tensor) -> None:
        with torch.no_grad():
            self.x.copy_(unit * self.width)

    def constraint(self, value_function: ValueFunction) -> float:
        """c = f - v_hat over all lower-level data."""
        lower = finite("lower", self.levels.value("lower", self.unit, self.levels.y))
        return lower - value_function.mean(self.unit).item()

    def lagrangian(self, state: MultiplierState, value_function: ValueFunction) -> float:
        """L over all data."""
        upper = finite("upper", self.levels.value("upper", self.unit, self.levels.y))
        return Equality(self.method.growth).merit(state, upper, self.constraint(value_function))

    def tune(self, state: MultiplierState, value_function: ValueFunction) -> tuple[float, float]:
        """The learning rate and momentum whose descent from here ends at the lowest L; x and y are put back."""
        start = [tensor.detach().clone() for tensor in (self.x, *self.weights)]
        scores: dict[tuple[float, float], float] = {}
        for pair in itertools.product(self.method.learning_rates, self.method.momenta):
            try:
                self.descend(state, value_function, *pair)
                scores[pair] = self.lagrangian(state, value_function)
            except NotFiniteError:
                continue
            finally:
                with torch.no_grad():
                    for tensor, value in zip((self.x, *self.weights), start, strict=True):
                        tensor.copy_(value)
        if not scores:
            raise NotFiniteError("every learning rate and momentum of the grid diverged")
        return min(scores, key=lambda pair: scores[pair])

    def descend(self, state: MultiplierState, value_function: ValueFunction, rate: float, momentum: float) -> None:
        optimizer = torch.optim.SGD([self.x, *self.weights], lr=rate, momentum=momentum)
        upper_batches, lower_batches = self._forever("upper"), self._forever("lower")
        problem, loss = self.levels.problem, self.levels.loss
        self.levels.model.eval()
        for _ in range(self.method.steps):
            above, below = next(upper_batches), next(lower_batches)
            optimizer.zero_grad()
            unit = self.x / self.width
            given = self.levels.hyperparameters(unit)
            upper = loss("upper", given, move(above, problem.device, problem.dtype))
            lower = loss("lower", given, move(below, problem.device, problem.dtype))
            # v_hat is on the CPU in double precision, wherever the model is.
            constraint = lower.to("cpu", torch.double) - value_function.mean(unit)
            merit = upper.to("cpu", torch.double) + (
                state.penalty / 2 * constraint.square() + state.multiplier * constraint
            )
            if not torch.isfinite(merit):
                raise NotFiniteError(f"the augmented Lagrangian is {merit.item()} at learning rate {rate}")
            merit.backward()
            self.levels.ledger.charge(problem.batch_size(above) + problem.batch_size(below))
            # As published, each tensor by itself and not the gradient as a whole.
            for tensor in (self.x, *self.weights):
                torch.nn.utils.clip_grad_norm_(tensor, self.method.clip)
            optimizer.step()
            with torch.no_grad():
                self.x.clamp_(torch.zeros_like(self.width), self.width)

    def _forever(self, level: Level) -> Iterator[Batch]:
        while True:
            yield from make_batches(self.levels.problem, level, self.generator, self.levels.config)
