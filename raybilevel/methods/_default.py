"""The default method: hypergradients at trained weights, a model of F, trust regions."""

from __future__ import annotations

import bisect
import itertools
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from statistics import median
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from raybilevel._descents.fixed_x import Budget, LagrangianPoint, lagrangian_point
from raybilevel._descents.trained_point import TrainedPoint
from raybilevel._lower.levels import Levels
from raybilevel._lower.likelihood import upper_likelihood
from raybilevel._lower.linearisation import NoisyError
from raybilevel._lower.precision import full_precision
from raybilevel._lower.trained_time import per_weight
from raybilevel._lower.variables import BoxVariables
from raybilevel._models.acquisition import (
    Factor,
    UpperModel,
    expected_improvement,
    fit_upper_model,
    minimise_in_box,
    most_feasible,
)
from raybilevel._models.constraints import Feasible, feasible_first, fit_metrics, judged
from raybilevel._models.discrete import covering
from raybilevel._models.feasibility import fit_feasibility
from raybilevel._models.generalisation import Surface, learn
from raybilevel._models.pareto import FrontModel, newest_of_front
from raybilevel._models.shrinkage import GroupPenalty
from raybilevel._models.trust import promises, trust
from raybilevel.errors import CheckpointError, ConfigError, NotFiniteError
from raybilevel.methods._base import LoadCheckpoint, Method, StepMethod, UpperResult, UpperStep
from raybilevel.methods._trust_region import TrustRegion, TrustRegionRule, distance
from raybilevel.problem import BilevelProblem, make_model
from raybilevel.search_state import Proposal, RegionHistory, SearchState, Shrinkage, StepRecord, Training, Unit
from raybilevel.space import Space, sobol_points

logger = logging.getLogger(__name__)

SAME = 1e-3
ENOUGH_TO_BEGIN = 8
"""Trainings after which steps begin, however many of the start design are still under way: half of hundreds is more
than a step needs, and slots wait for it."""
FULL_SHARE, SELDOM = 2.0, 0.25
"""Share of steps that take hypergradients for each unit of trust, and the least."""
VALUES_TO_MEET = 6
"""Values of a hyperparameter that the start design meets all of; of more, some."""
MORE_BY_VALUES = 4
"""Points that the start design may have more, one for each hyperparameter that is searched by values."""
PRIOR_WEIGHT = 10.0
"""Over the number of trainings it is the exponent of the user's prior, beta of Hvarfner et al. (2022)."""
PLAIN_STEPS = 4
"""Upper-level steps before groups of hyperparameters are held together: from points at which their members are equal,
nothing is seen of what their differences are worth."""


@dataclass(frozen=True)
class Default(Method):
    """Trust regions on a model of F with hypergradients; docs/explanation/method.md has the equations.

    start_points:  size of the start design, if there are not more slots, and all hyperparameters have gradients.
    decrease:      how far below the trained F the Lagrangian point lies, relative to |F|; decides the multiplier.
    hypergradients: False for values of F only, where the metric that is searched is not the upper-level loss.
    upper_share:   gradient evaluations of one hypergradient, as a share of a training's. Trainings to a minimum and
        short ones get more (`Budget`). Where that is too few, there are no hypergradients.
    explore_every: one proposal in so many looks at the whole box, half of those far from all that is known.
    max_regions:   trust regions open at once, where there are slots for them.
    settled:       a region is left when a step promised and brought less than this share of the spread of F.
    generalise:    hyperparameters of a kind may differ as far as the validation examples support it, and F is judged
        with the penalty that follows (`_models.generalisation`); False for the lowest F.
    beta:          a region's next point minimises mean - sqrt(beta) deviation of the model of F.
    max_rows:      values and derivatives that a Gaussian process may hold.
    """

    searches_by_values: ClassVar[bool] = True
    takes_constraints: ClassVar[bool] = True
    takes_others: ClassVar[bool] = True
    takes_priors: ClassVar[bool] = True
    fills_slots: ClassVar[bool] = True
    enough_stopped: ClassVar[int | None] = ENOUGH_TO_BEGIN

    # Five start points were later on smooth problems, the centre alone stuck in local optima (method.md).
    start_points: int = 3
    hypergradients: bool = True
    decrease: float = 0.05
    upper_share: float = 0.2
    explore_every: int = 6
    max_regions: int = 4
    max_rows: int = 500
    settled: float = 0.001
    generalise: bool = True
    # Mean - 0.5 deviation was mostly worse (method.md).
    beta: float = 0.0
    region: TrustRegionRule = field(default_factory=TrustRegionRule)

    def __post_init__(self) -> None:
        for name in ("decrease", "upper_share"):
            if not 0 < getattr(self, name) <= 10:
                raise ConfigError(f"{name} must be positive (and at most 10), got {getattr(self, name)}")
        for name, least in (("start_points", 1), ("explore_every", 2), ("max_regions", 1), ("max_rows", 20)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}")

    @property
    def upper_steps(self) -> StepMethod:
        return self

    def for_metric(self, metric: str) -> Self:
        return replace(self, hypergradients=False)

    def start_design(self, space: Space, slots: int, seed: int) -> Tensor:
        """Centre, two more points of the diagonal, and a scrambled Sobol sequence; at least one point a slot.

        Hyperparameters that are searched by values are on the diagonal at the centre alone, and have more points.
        Whole numbers and choices go through their values instead, and there are points enough to meet each of a few.
        """
        # On many regularisation problems most of the gain of a random search is on the diagonal, one shared value.
        diagonal = torch.tensor([[0.5], [0.25], [0.75]], dtype=torch.double).expand(3, space.dimension)
        most = max((len(values) for values in space.discrete.values()), default=0)
        by_values = ~torch.tensor(space.smooth)
        more = min(int(by_values.sum()), MORE_BY_VALUES)
        count = max(slots, self.start_points + more, min(most, VALUES_TO_MEET))
        sequence = sobol_points(space.dimension, max(3, count - 1), seed)
        points = torch.cat([diagonal, sequence[:-2]])
        # On a diagonal, with all others, the effect of one could not be told.
        points[1:3, by_values] = sequence[-2:, by_values]
        points = points[:count]
        points = covering(points, space.discrete, seed)
        return space.expected(points) if space.has_priors else points

    def plan(self, state: SearchState, running: tuple[UpperStep, ...], slots: int, seed: int) -> UpperStep | None:
        # Plans follow F with the penalty. The step gets plain F, as it learns the penalty's strength anew.
        plain, state = state, judged(state)
        if not state.done and len(state.measured) >= ENOUGH_TO_BEGIN:
            state = stopped_as_done(state)
        done = state.done
        starting = [t for t in state.pending if t.proposal.origin in ("start", "given")]
        # Until more trainings have ended than are under way of the start design, or than ENOUGH_TO_BEGIN.
        if len(done) <= min(len(starting), ENOUGH_TO_BEGIN):
            return None
        number = len(state.steps) + len(running)
        pending = tuple(t.unit for t in state.pending)
        step = UpperStep(number, "region", self._incumbent(state), plain, seed + 1000 * number, pending=pending)
        if plain.others:
            wanted = newest_of_front(plain, {index for other in running for index in other.targets})
            return replace(step, origin="front", targets=wanted if self.hypergradients and self._due(plain) else ())
        if number % self.explore_every == self.explore_every - 1:
            return self._look(step, running)
        regions = self.open_regions(state, running)
        under_way = self._under_way(state, running)
        busy = {region.began: under_way[region.began] for region in regions}
        # A new region only where every open one has something under way, and slots are left.
        if not regions or (min(busy.values()) > 0 and len(regions) < min(slots, self.max_regions)):
            start = self._next_start(state, running)
            if start is not None:
                regions, busy = (*regions, TrustRegion(start, start, self.region.initial)), {**busy, start: 0}
        if not regions:
            return self._look(step, running)
        # The one with the least under way; among equals, with the lowest F.
        region = min(regions, key=lambda r: (busy[r.began], state.trainings[r.centre].upper_loss))
        # Steps under way are finding these hypergradients.
        claimed = {index for step in running for index in step.targets}
        # Where hypergradients were looked for in vain, other trainings may still have one.
        newest = (done if in_vain(plain) else state.region(region.began).done)[-1].index
        lacking = [i for i in dict.fromkeys((region.centre, newest)) if state.trainings[i].hypergradient is None]
        if not self.hypergradients or not self._due(plain):
            lacking = []
        return replace(
            step,
            centre=region.centre,
            region=region.began,
            radius=region.radius,
            targets=tuple(i for i in lacking if i not in claimed),
            rank=busy[region.began],
        )

    def _look(self, step: UpperStep, running: tuple[UpperStep, ...]) -> UpperStep:
        """The step as a look at the whole box, of the kind of which there have been fewer."""
        if self._without_hypergradients(step.state):
            # All steps look at it there, and each second of these looks fills.
            fills = step.number % (2 * self.explore_every) == 2 * self.explore_every - 1
            return replace(step, origin="fill" if fills else "global")
        origins = [t.proposal.origin for t in step.state.trainings] + [other.origin for other in running]
        return replace(step, origin="fill" if origins.count("fill") < origins.count("global") else "global")

    def converged(self, state: SearchState) -> bool:
        """Every region that was begun has settled or collapsed."""
        state = judged(state)
        return any(t.proposal.region is not None for t in state.done) and not self.open_regions(state, ())

    def incumbent(self, state: SearchState) -> Training | None:
        """The training expected to be best on new data: the lowest F at trained weights, with the penalty on groups.

        One whose F the model expects to be lower takes its place, if by more than the share `settled` of the spread of
        F: where values are noisy, the lowest F seen is that of the luckiest training (the winner's curse). It must have
        been seen below the median: a model of much noise may expect anything of one that was far worse than most. Nor
        may the penalty choose such a one, where it is so strong that it leaves few to choose from.
        """
        seen, expected = judged(state), state.expected
        # With several objectives it is the end of the front at which F is lowest.
        if seen.best is None or state.others:
            return super().incumbent(state)
        # F without the penalty.
        upper = {t.index: t.upper_loss for t in feasible_first(state).done}
        typical = median(upper.values())
        # No farther above the median than the lowest is below it.
        most = 2 * typical - min(upper.values())
        best = min((t for t in seen.done if upper[t.index] <= most), key=lambda t: t.upper_loss).index
        if best in expected:
            modelled = (replace(t, upper_loss=expected[t.index]) for t in state.trainings if t.index in expected)
            by_model = judged(replace(state, trainings=tuple(modelled)))
            merits = {t.index: t.upper_loss for t in by_model.done if t.index == best or upper[t.index] <= typical}
            lowest = min(merits, key=merits.__getitem__)
            if merits[best] - merits[lowest] > self.settled * seen.spread:
                best = lowest
        return state.trainings[best]

    def open_regions(self, state: SearchState, running: tuple[UpperStep, ...]) -> tuple[TrustRegion, ...]:
        """Regions that still promise something: not collapsed, not settled, not beaten by another."""
        begun = self._begun(state, running) - state.settled
        promising = tuple(sorted(region for region in begun if not self._over(state.region(region), state)))
        return tuple(r for r in self.region.replay(state, promising) if not self.region.collapsed(r))

    @classmethod
    def _begun(cls, state: SearchState, running: tuple[UpperStep, ...]) -> set[int]:
        return {*state.regions, *(region for region in cls._under_way(state, running) if region is not None)}

    def _over(self, region: RegionHistory, state: SearchState) -> bool:
        if len(region.done) == 1:
            return False
        upper, last = state.sorted_upper, region.done[-1]
        gain = self.settled * state.spread
        promised, before = last.proposal.predicted_upper_loss, region.best_before
        beaten = len(region.done) > 3 and region.best > upper[0] and (promised is None or promised > upper[0])
        # A promise below 0, a rise, says that the model is wrong, and not that the region is done.
        settled = promised is not None and 0 <= before - promised < gain and before - last.upper_loss < gain
        return beaten or settled

    @staticmethod
    def _under_way(state: SearchState, running: tuple[UpperStep, ...]) -> Counter[int | None]:
        """How many trainings and steps each region has under way; None stands for those outside every region."""
        return Counter([*(t.proposal.region for t in state.pending), *(step.region for step in running)])

    def _next_start(self, state: SearchState, running: tuple[UpperStep, ...]) -> int | None:
        """The best training outside every region that has no better one within a region's first radius (the rule of
        multi-level single linkage, Rinnooy Kan & Timmer 1987). When the last open region has been left, the box is
        explored once more first: None until a point from outside is the newest."""
        begun = self._begun(state, running) | state.settled  # some were left before anything was trained in them
        left = bool(begun) and not any(step.region is not None for step in running)
        done = state.done
        if left and done[-1].proposal.region is not None:
            return None
        ranked = sorted(done, key=lambda t: t.upper_loss)
        # NumPy in the driver: torch takes five times as long, 9 ms at 1,000 trainings.
        units = np.fromiter(itertools.chain.from_iterable(t.unit for t in ranked), float).reshape(len(ranked), -1)
        for training, unit in zip(ranked, units, strict=True):
            if training.proposal.region is None and training.index not in begun:
                # Rows are in the order of F, so that those before this place have a lower one.
                better = units[: bisect.bisect_left(state.sorted_upper, training.upper_loss)]
                if not (np.abs(better - unit).max(1) <= self.region.initial).any():
                    return training.index
        return None

    @staticmethod
    def _incumbent(state: SearchState) -> int:
        best = state.best
        assert best is not None
        return best.index

    def run(
        self,
        problem: BilevelProblem,
        space: Space,
        constants: Mapping[str, Any],
        step: UpperStep,
        load: LoadCheckpoint,
        memory: bytes | None = None,
    ) -> UpperResult:
        state, passes = step.state, 0.0
        found: dict[int, Unit] = {}
        unreadable: dict[int, str] = {}
        record: dict[str, Any] = {}
        # Hypergradients, each at the weights of its training.
        for index in step.targets:
            looked = self._look_at(problem, space, constants, step, index, load)
            found[index], passes = looked.gradient, passes + looked.passes
            if looked.unreadable is not None:
                unreadable[index] = looked.unreadable
            # So that the models below learn from it.
            state = state.change(index, hypergradient=found[index])
            if looked.descent is not None:
                record = {"multiplier": looked.descent.multiplier, "decrease": looked.descent.decrease}
        # The models: of F, of where trainings are feasible, and of how far groups may differ. None of v: it would
        # decide nothing (method.md).
        centre = torch.tensor(state.trainings[step.centre].unit, dtype=torch.double)
        pending = [torch.tensor(unit, dtype=torch.double) for unit in step.pending]
        trusted = trust(promises(state))
        believed = [] if state.others else pending  # a front takes pending points into account itself
        model_of_upper = fit_upper_model(state.measured, believed, centre, self.max_rows, space.unordered, trusted)
        front_model = FrontModel.of(state, model_of_upper, pending, centre, self.max_rows, space.unordered)
        feasibility = self._feasibility(state, centre, space)
        shrinkage = self._shrinkage(problem, space, constants, state, model_of_upper, step.centre)
        # The next training, and what is noted of the step.
        penalty = GroupPenalty.of(shrinkage) if shrinkage is not None and shrinkage.applied else None

        def propose(step: UpperStep, penalty: GroupPenalty | None) -> Tensor:
            found = self._propose(step, space, model_of_upper, feasibility, centre, penalty, front_model)
            return snap(found, space)

        if step.origin == "region" and self._by_values(state, space):
            step = replace(step, origin="global", region=None)
        asked, (step, unit) = step, new_point(step, propose, penalty)
        if asked.origin == "region" and step is not asked:
            record["settled"] = asked.region
        proposal = Proposal(
            tuple(unit.tolist()), step.origin, step.region,
            # Around a training that breaks constraints a step seeks to keep them, and promises nothing of F.
            model_of_upper.mean(unit) if state.trainings[step.centre].feasible else None,
            gain=model_of_upper.gain(unit),
        )  # fmt: skip
        candidates = [t for t in state.done if t.feasible] or state.done
        taken = StepRecord(
            step.number, step.centre, passes, shrinkage=shrinkage, trust=trusted, seen=len(state.told),
            expected=model_of_upper.lowest(candidates, penalty) if candidates else (), **record,
        )  # fmt: skip
        return UpperResult(taken, proposal, found, unreadable=unreadable)

    def _feasibility(self, state: SearchState, centre: Tensor, space: Space) -> Feasible | None:
        """Where trainings succeed and keep the constraints; None where none has failed and there are no constraints."""
        succeeds = fit_feasibility(state.told, centre)
        kept = fit_metrics(state.measured, centre, self.max_rows, space.unordered)
        if succeeds is None:
            return Feasible(kept) if kept else None
        return Feasible((*kept, succeeds))

    def _look_at(
        self,
        problem: BilevelProblem,
        space: Space,
        constants: Mapping[str, Any],
        step: UpperStep,
        index: int,
        load: LoadCheckpoint,
    ) -> Looked:
        """The hypergradient at the weights of one training."""
        if not any(space.smooth):  # by values alone: there is no gradient to look for
            return Looked()
        try:
            checkpoint = load(index)
        except CheckpointError as error:
            return Looked(unreadable=str(error))
        state = step.state
        unit = torch.tensor(state.trainings[index].unit, dtype=torch.double)
        variables = BoxVariables(space, constants)
        config = variables.config(unit)
        model = make_model(problem, config)
        model.load_state_dict(checkpoint["model"])
        levels = Levels(problem, model, variables, config)
        time = per_weight(checkpoint.get("time"), model)

        def budget() -> Budget:
            training, slopes = state.passes_per_training, sum(space.smooth)
            found = Budget.of(levels, training, self.upper_share, time, slopes)
            return found.within(step.most_memory, levels.y)

        if Budget(1, 1).within(step.most_memory, levels.y).most < 1:
            say_too_large(type(problem).__name__, levels.y.numel(), step.most_memory)
            return Looked()
        try:
            with full_precision():
                point = TrainedPoint(levels, unit, time) if budget().most >= 1 else None
                # Asked again: how many draws a loss takes is known when it was evaluated.
                if point is None or budget().most < 1:
                    say_too_short(type(problem).__name__)
                    return Looked(passes=levels.passes)
                descent = lagrangian_point(point, self.decrease, budget())
        except (NotFiniteError, NoisyError) as error:
            logger.warning("no hypergradient at training %d: %s", index, error)
            return Looked(passes=levels.passes)
        return Looked(space.known(descent.known.tolist(), unit), levels.passes, descent)

    def _by_values(self, state: SearchState, space: Space) -> bool:
        """Whether steps look at the whole box, as there are no hypergradients, and none where they were looked for.

        A user's prior would weigh on all of them, so with one there are regions.
        """
        return not space.has_priors and (self._without_hypergradients(state) or not any(space.smooth))

    def _without_hypergradients(self, state: SearchState) -> bool:
        """Whether none are taken, or none was found where they were looked for."""
        return in_vain(state) or not self.hypergradients

    @staticmethod
    def _due(state: SearchState) -> bool:
        """Whether a step takes hypergradients: the less they are trusted, the fewer do."""
        share = max(SELDOM, min(1.0, FULL_SHARE * state.trust))
        taken = sum(step.passes > 0 for step in state.steps)
        return taken <= share * len(state.steps)

    def _shrinkage(
        self,
        problem: BilevelProblem,
        space: Space,
        constants: Mapping[str, Any],
        state: SearchState,
        model: UpperModel,
        centre: int,
    ) -> Shrinkage | None:
        """How far hyperparameters of a kind may differ; None while too little is known, or if F is no likelihood.

        centre: the training around which the model is.
        """
        # With several objectives every training of the front is a result, and none is the best on new data.
        if state.others:
            return None
        # Values alone say too little of the bends of F, by which the evidence is told.
        if len(state.steps) < PLAIN_STEPS or not model.process.model.has_derivatives or not state.done:
            return None
        groups = space.groups()
        incumbent = self.incumbent(state)
        assert incumbent is not None
        around = torch.tensor(incumbent.unit, dtype=torch.double)
        variables = BoxVariables(space, constants)
        known = upper_likelihood(problem, variables.given(around), variables.config(around))
        if known.kind is None:
            if groups and self.generalise and problem.upper_likelihood == "auto":
                say_once(type(problem).__name__)
            return None
        surface = Surface.of(model, known.kind)
        # It is the bends of F at the result that are asked for. Where rows run out, a model around another training
        # has few of the hypergradients that say them.
        if incumbent.index != centre and len(surface.differentiated) < sum(bool(t.hypergradient) for t in state.done):
            nearer = fit_upper_model(state.measured, [], around, self.max_rows, space.unordered, trust(promises(state)))
            if not nearer.process.model.has_derivatives:
                return None
            surface = Surface.of(nearer, known.kind)
        before = [step.shrinkage.evidence for step in state.steps if step.shrinkage and step.shrinkage.evidence]
        return learn(surface, groups, known.examples, around, before, self.generalise)

    def _propose(
        self,
        step: UpperStep,
        space: Space,
        model: UpperModel,
        feasibility: Feasible | None,
        centre: Tensor,
        penalty: GroupPenalty | None = None,
        front_model: FrontModel | None = None,
    ) -> Tensor:
        if step.origin == "fill":
            known = [t.unit for t in step.state.trainings] + list(step.pending)
            return farthest(torch.tensor(known, dtype=torch.double), step.seed, feasibility)
        starts = [centre]
        cell = space.next_cell([t.unit for t in step.state.trainings])
        discrete = {**space.discrete, **{coordinate: (value,) for coordinate, value in cell.items()}}
        low, high = torch.zeros_like(centre), torch.ones_like(centre)
        if step.origin == "region":
            low, high = (centre - step.radius).clamp(0, 1), (centre + step.radius).clamp(0, 1)
            # A coordinate at rest stands for none. Where a choice makes it active, all of its range is open.
            low[~space.active(centre)], high[~space.active(centre)] = 0.0, 1.0
        if feasibility is not None and not step.state.trainings[step.centre].feasible:
            return most_feasible(model, feasibility, low, high, starts, step.seed, discrete, space.at_rest)
        factors = factors_of(step.state, space, feasibility)
        if front_model is not None:
            return front_model.propose(step.seed, discrete, space.at_rest, factors)
        if step.origin == "global":
            return expected_improvement(model, len(centre), starts, step.seed, discrete, space.at_rest, factors)
        # The deviation is small beside pending points, so that weight on it leads away from them.
        beta = self.beta + 0.25 * step.rank
        return minimise_in_box(model, low, high, starts, beta, step.seed, penalty, discrete, space.at_rest, feasibility)


@dataclass(frozen=True)
class Looked:
    """What a step found at the weights of one training.

    gradient:   its hypergradient; empty where there is none, so that no step looks again.
    passes:     what that cost.
    descent:    where it comes from.
    unreadable: why its checkpoint could not be read.
    """

    gradient: Unit = ()
    passes: float = 0.0
    descent: LagrangianPoint | None = None
    unreadable: str | None = None


def in_vain(state: SearchState) -> bool:
    """Whether hypergradients have been looked for, and none was found."""
    looked_at = [t.hypergradient for t in state.trainings if t.hypergradient is not None]
    return bool(looked_at) and not any(looked_at)


def stopped_as_done(state: SearchState) -> SearchState:
    """The search with trainings that were stopped as if they had run to their end, without gradients: to plan by their
    values where there are no others."""
    # () and not None, or steps would look for hypergradients at weights that were not kept.
    trainings = tuple(replace(t, status="done", hypergradient=()) if t.status == "stopped" else t
                      for t in state.trainings)  # fmt: skip
    return replace(state, trainings=trainings)


def factors_of(state: SearchState, space: Space, feasibility: Feasible | None) -> list[Factor]:
    """What multiplies an expected improvement: the probability of a feasible training, and the user's prior with an
    exponent that falls with every training (Hvarfner et al. 2022, piBO, arXiv:2204.11051)."""
    factors: list[Factor] = [] if feasibility is None else [feasibility.log_probability]
    if space.has_priors:
        exponent = PRIOR_WEIGHT / max(1, len(state.measured))
        factors.append(lambda x: exponent * space.log_prior(x))
    return factors


@lru_cache
def say_once(problem: str) -> None:
    """That groups of hyperparameters are not held together, once in a process."""
    logger.warning(
        "%s: hyperparameters of a kind are not held together (generalise), since F is not known to be a mean negative "
        "log-likelihood or a mean squared error; set upper_likelihood on the problem ('none' if it is neither)",
        problem,
    )


@lru_cache
def say_too_short(problem: str) -> None:
    """That there are no hypergradients, once in a process."""
    logger.warning(
        "%s: hypergradients: off, trainings are too short for them to pay; the search goes by values of F; train for "
        "more epochs, or raise the setting upper_share",
        problem,
    )


@lru_cache
def say_too_large(problem: str, weights: int, memory: float | None) -> None:
    """That the memory of a step holds no hypergradient, once in a process."""
    logger.warning(
        "%s: hypergradients: off, %d weights are too many for the %.3g bytes of memory that an upper-level step asks "
        "for; the search goes by values of F; let steps ask for more", problem, weights, memory,
    )  # fmt: skip


def farthest(known: Tensor, seed: int, feasibility: Feasible | None = None) -> Tensor:
    """Of 64 scrambled Sobol points the one farthest from all that are known, shape (d,); where trainings have failed or
    there are constraints, distances count times the probability of a feasible one."""
    points = sobol_points(known.shape[1], 64, seed)
    # Such points become dense in the box, which is what global convergence rests on (method.md, guarantees).
    distances = torch.cdist(points, known).amin(1)
    if feasibility is not None:
        distances = distances * feasibility.log_probability(points).exp()
    return points[distances.argmax()]


def snap(unit: Tensor, space: Space) -> Tensor:
    """The point that is trained: steps of quantised hyperparameters applied."""
    return space.rounded(unit)


def new_point(
    step: UpperStep, propose: Callable[[UpperStep, GroupPenalty | None], Tensor], penalty: GroupPenalty | None
) -> tuple[UpperStep, Tensor]:
    """The step and its point. If the model expects nothing better than what is trained already, it is a step elsewhere:
    by the model of the whole box, or else to where nothing is known."""
    unit = propose(step, penalty)
    for origin in ("global", "fill"):
        if is_new(unit, step):
            break
        step = replace(step, origin=origin, region=None)
        unit = propose(step, None)
    return step, unit


def is_new(unit: Tensor, step: UpperStep) -> bool:
    """Whether a point is none of those trained or under way, to a thousandth of the box."""
    point, known = tuple(unit.tolist()), [t.unit for t in step.state.trainings] + list(step.pending)
    return all(distance(point, other) > SAME for other in known)
