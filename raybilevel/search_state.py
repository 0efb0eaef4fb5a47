"""What a search has asked, heard and learned: plain values, from which every decision follows."""

from __future__ import annotations

import bisect
import io
import itertools
import math
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

__all__ = [
    "Origin",
    "Proposal",
    "RegionHistory",
    "SearchState",
    "Shrinkage",
    "Status",
    "StepRecord",
    "Training",
    "Unit",
    "or_zero",
]

Status = Literal["pending", "done", "stopped", "failed", "lost"]
Origin = str
"""Where a proposal comes from. Of the search itself: "start" (the method's design), "given" (by the user), "fill" (a
space-filling point), "unknown" (a trial that it did not ask for), "evaluated" (a point whose F is known from
elsewhere). Of a method's steps: what the method calls it."""
Unit = tuple[float, ...]
Likelihood = Literal["log_likelihood", "squared_error"]


@dataclass(frozen=True)
class Proposal:
    """A point that an upper-level step wants trained next.

    unit:            where, in the unit cube, shape (d,).
    origin:          e.g. "region" (a trust region's next point), "global" (acquisition over the box) or "fill".
    region:          the trust region, named by the index of the training that began it.
    predicted_upper_loss: F expected there.
    gain:            of the Kalman update of the model of F by the training: the share that it will believe of how far F
        is from what was predicted, 0 to 1; less than 1 where values are noisy.
    predicted_value: v_hat there, before it is trained, of a method that has a v_hat; its error is a diagnostic.
    deviation:       posterior standard deviation of v_hat there.
    violation:       of the constraint where the descent ended that proposed it.
    """

    unit: Unit
    origin: Origin
    region: int | None = None
    predicted_upper_loss: float | None = None
    predicted_value: float | None = None
    deviation: float | None = None
    violation: float | None = None
    gain: float | None = None


class PickledOnce:
    """Remembers its pickle: a record goes out with every upper-level step, and most do not change any more."""

    @cached_property
    def pickled(self) -> bytes:
        return pickle.dumps(self, pickle.HIGHEST_PROTOCOL)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "pickled"}


@dataclass(frozen=True)
class Training(PickledOnce):
    """One lower-level training, from its proposal on.

    status:   "stopped" is a training that a scheduler ended early: it has an F, but says nothing of v;
              "lost" one that nobody runs any more, whose configuration was resubmitted.
    finished: the order in which results came in, 0, 1, ...; -1 while pending.
    lower_loss, upper_loss: f and F at the trained weights; where another metric is searched, that one, with its sign
        turned where it is maximised, stands for F.
    lower_gradient: df/dx there, shape (d,), in the unit cube; NaN where it is not known, as below.
    passes:         what it cost, in gradient evaluations of f.
    hypergradient: dF(x, y*(x))/dx there from an upper-level step, shape (d,), in the unit cube; empty where the step
        found none.
    excesses: how far each constrained metric is beyond its bound, shape (constraints,), see `MetricBound.excess`; NaN
        where the metric was not reported.
    others: the objectives beside F, each to be minimised, shape (others,); NaN likewise.
    """

    index: int
    proposal: Proposal
    status: Status = "pending"
    finished: int = -1
    lower_loss: float = math.nan
    upper_loss: float = math.nan
    lower_gradient: Unit = ()
    passes: float = 0.0
    hypergradient: Unit | None = None
    excesses: tuple[float, ...] = ()
    others: tuple[float, ...] = ()

    @property
    def unit(self) -> Unit:
        return self.proposal.unit

    @property
    def feasible(self) -> bool:
        """Whether it keeps every constraint; of a search without constraints, every training does."""
        return all(excess <= 0 for excess in self.excesses)

    @property
    def excess(self) -> float:
        """How far it is beyond its bounds in all: 0 where it is feasible, infinite where that is not known."""
        if any(map(math.isnan, self.excesses)):
            return math.inf
        return sum((excess for excess in self.excesses if excess > 0), 0.0)

    @property
    def rank(self) -> tuple[float, float]:
        """The lower the better: a feasible training before any other, then by F."""
        return self.excess, self.upper_loss


@dataclass(frozen=True)
class Shrinkage:
    """How far hyperparameters of a kind may differ, as an upper-level step learned it; see `_models.generalisation`.

    groups:     the coordinates of each group.
    likelihood: what makes a likelihood of F.
    examples:   of the upper level, n.
    strength:   tau, by the evidence of this step and of those before.
    mode:       where the model of F has its minimum under that penalty, shape (d,), in the unit cube.
    supported:  how many hyperparameters the examples determine.
    applied:    the search uses the penalty; otherwise it only says what it would be.
    adapted:    how many of those that are determined are off their bounds, and so follow the chance in the examples;
        None where the mode is at no bound, and they are all.
    evidence:   of this step, in nats less the highest, for each of `_models.generalisation.STRENGTHS`; empty without
        groups.
    """

    groups: tuple[tuple[int, ...], ...]
    likelihood: Likelihood
    examples: int
    strength: float
    mode: Unit
    supported: float
    applied: bool
    adapted: float | None = None
    evidence: tuple[float, ...] = ()


@dataclass(frozen=True)
class StepRecord(PickledOnce):
    """One finished upper-level step.

    centre:      index of the training whose weights it started from.
    multiplier:  of its augmented Lagrangian; None where it had no hypergradient to take.
    violation:   of the constraint of v_hat at the end of its descent; None of a method without v_hat.
    decrease:    F at the trained weights less F where that Lagrangian is least, relative to |F|.
    penalty, rate, momentum: of the published scheme, for its next descent.
    finished:    how many trainings had finished when its result came.
    settled:     a trust region in which it found nothing better to propose.
    failed:      it raised, or its worker died; the search goes on without it.
    passes:      what it cost, in gradient evaluations of f.
    shrinkage:   what it learned of groups of hyperparameters, if there are any.
    trust:       what its model of F multiplied hypergradients by, from 0 to 1; see `_models.trust`.
    seen:        how many trainings had ended in what its model was fitted to.
    expected:    F by its model at some trainings, those where that is lowest among them, by index.
    """

    number: int
    centre: int
    passes: float
    multiplier: float | None = None
    violation: float | None = None
    decrease: float | None = None
    penalty: float | None = None
    rate: float | None = None
    momentum: float | None = None
    finished: int = 0
    settled: int | None = None
    failed: bool = False
    shrinkage: Shrinkage | None = None
    trust: float | None = None
    seen: int = 0
    expected: tuple[tuple[int, float], ...] = ()


# Compared by identity, as it is a key of a cache (`_trust_region.replayed`).
@dataclass(frozen=True, eq=False)
class RegionHistory:
    """A trust region's trainings that have ended, in order; the first is the one at which it began."""

    trainings: tuple[Training, ...]

    @cached_property
    def done(self) -> tuple[Training, ...]:
        """The first, and the others that ran to their end."""
        return (self.trainings[0], *(t for t in self.trainings[1:] if t.status == "done"))

    @cached_property
    def best(self) -> float:
        """The lowest F of `done`."""
        return min(t.upper_loss for t in self.done)

    @cached_property
    def best_before(self) -> float:
        """The lowest F of `done` but the last."""
        return min((t.upper_loss for t in self.done[:-1]), default=math.nan)

    def change(self, before: Training, after: Training) -> RegionHistory:
        return RegionHistory(tuple(after if t is before else t for t in self.trainings))


@dataclass(frozen=True)
class SearchState:
    """Every training and every upper-level step so far. What is derived from them is worked out once."""

    trainings: tuple[Training, ...] = ()
    steps: tuple[StepRecord, ...] = ()

    @cached_property
    def told(self) -> tuple[Training, ...]:
        """Trainings that ended, in whatever way, in the order in which they did."""
        return tuple(sorted((t for t in self.trainings if t.finished >= 0), key=lambda t: t.finished))

    @cached_property
    def done(self) -> tuple[Training, ...]:
        """Trainings that ran to their end."""
        return tuple(t for t in self.told if t.status == "done")

    @cached_property
    def measured(self) -> tuple[Training, ...]:
        """Trainings that have an F: those that ran to their end, and those stopped early."""
        return tuple(t for t in self.told if t.status in ("done", "stopped"))

    @cached_property
    def pending(self) -> tuple[Training, ...]:
        return tuple(t for t in self.trainings if t.status == "pending")

    @cached_property
    def sorted_upper(self) -> list[float]:
        """F of the trainings that ran to their end, the lowest first."""
        return sorted(t.upper_loss for t in self.done)

    @property
    def spread(self) -> float:
        """Distance of the median F from the lowest."""
        return self.sorted_upper[len(self.sorted_upper) // 2] - self.sorted_upper[0]

    @cached_property
    def regions(self) -> dict[int, RegionHistory]:
        """Trust regions in which a training has ended, by the index of the training at which each began."""
        found: dict[int, list[Training]] = {}
        for training in self.told:
            region = training.proposal.region
            if region not in (None, training.index):
                found.setdefault(region, [self.trainings[region]]).append(training)
        return {region: RegionHistory(tuple(trainings)) for region, trainings in found.items()}

    def region(self, began: int) -> RegionHistory:
        return self.regions.get(began) or RegionHistory((self.trainings[began],))

    def number(self, training: Training) -> int:
        """A training's number for people: from 1, in the order in which trainings were asked, as Tune numbers its
        trials. Points whose F is known from elsewhere have none, and do not count; 0 stands for it."""
        if training.proposal.origin == "evaluated":
            return 0
        return training.index + 1 - sum(t.proposal.origin == "evaluated" for t in self.trainings[: training.index])

    @cached_property
    def best(self) -> Training | None:
        """The incumbent: the lowest F at trained weights; of those that keep the constraints, if any does."""
        return min(self.done, key=lambda t: t.rank, default=None)

    @property
    def start(self) -> Training | None:
        """The first training that ran to its end, which is what the others are compared with."""
        return min(self.done, key=lambda t: t.index, default=None)

    @property
    def others(self) -> int:
        """The number of objectives beside F."""
        return max((len(t.others) for t in self.measured), default=0)

    @cached_property
    def passes_per_training(self) -> float:
        """Gradient evaluations of f that a training takes on average; 1 before the first."""
        done = self.done
        # It divides. A trainable of the user's own may report no passes.
        return max(1e-12, sum(t.passes for t in done) / len(done)) if done else 1.0

    @cached_property
    def settled(self) -> frozenset[int]:
        """Trust regions in which a step found nothing better to propose."""
        return frozenset(step.settled for step in self.steps if step.settled is not None)

    @property
    def shrinkage(self) -> Shrinkage | None:
        """What the last step that looked at groups of hyperparameters learned."""
        return next((step.shrinkage for step in reversed(self.steps) if step.shrinkage is not None), None)

    @property
    def expected(self) -> dict[int, float]:
        """F without the luck of one training, by index: where the last model of F has it lowest among trainings, and at
        those that model has not seen. Empty before there is a model."""
        last = next((step for step in reversed(self.steps) if step.expected), None)
        if last is None:
            return {}
        newer = {t.index: expected_after(t) for t in self.told[last.seen :] if t.status == "done"}
        return {**newer, **dict(last.expected)}

    @property
    def trust(self) -> float:
        """In hypergradients, by the last step; 1 before there is one."""
        return next((step.trust for step in reversed(self.steps) if step.trust is not None), 1.0)

    @property
    def cost(self) -> float:
        """What was spent, in trainings."""
        costs = self.costs()
        return costs[-1] if costs else 0.0

    def costs(self) -> list[float]:
        """What had been spent when each training of `told` ended, in trainings.

        Upper-level steps and stopped trainings are charged by their gradient evaluations, failed trainings in full.
        """
        unit, told = self.passes_per_training, self.told
        trainings = [1.0 if t.status != "stopped" else t.passes / unit for t in told]
        for step in self.steps:
            if told:
                # A step that ended after the last training is charged to that.
                trainings[min(step.finished, len(told) - 1)] += step.passes / unit
        return list(itertools.accumulate(trainings))

    # With a change, what is derived is carried over or brought up to date, not worked out again from all trainings.

    def add(self, proposal: Proposal) -> SearchState:
        training = Training(len(self.trainings), proposal)
        new = replace(self, trainings=(*self.trainings, training))
        return new._knowing(self.__dict__ | {"pending": (*self.pending, training)})

    def after(self, step: StepRecord) -> SearchState:
        """With one more finished step."""
        settled = self.settled if step.settled is None else self.settled | {step.settled}
        return replace(self, steps=(*self.steps, step))._knowing(self.__dict__ | {"settled": settled})

    def change(self, index: int, **changes: Any) -> SearchState:
        before, after = self.trainings[index], replace(self.trainings[index], **changes)
        new = replace(self, trainings=put(self.trainings, index, after))
        # Only steps settle regions.
        new._knowing({"settled": self.settled})
        # It has ended, as the last so far: what is derived grows by it.
        if before.finished < 0 and after.finished == len(self.told):
            return new._knowing(self._with_end(before, after))
        # Only more is known of it, e.g. its hypergradient. After a second try all is worked out again.
        same = (
            before.status == after.status
            and before.upper_loss == after.upper_loss
            and before.excesses == after.excesses
            and before.others == after.others
            and before.finished == after.finished
        )
        if same and self.told[before.finished : before.finished + 1] == (before,):
            return new._knowing(self._with_more(before, after))
        return new

    def _with_end(self, before: Training, after: Training) -> dict[str, Any]:
        """What is known once a training has ended, as the last of all."""
        regions, region = self.regions, after.proposal.region
        if region not in (None, after.index):
            regions = regions | {region: RegionHistory((*self.region(region).trainings, after))}
        pending = tuple(t for t in self.pending if t is not before)
        known: dict[str, Any] = {"told": (*self.told, after), "pending": pending, "regions": regions}
        if after.status != "done":
            return known | {name: getattr(self, name) for name in ("done", "sorted_upper", "best")}
        # The state before keeps its own.
        sorted_upper = self.sorted_upper.copy()
        bisect.insort(sorted_upper, after.upper_loss)
        # Of equals the earlier one, as `min` takes.
        best = self.best if self.best is not None and self.best.rank <= after.rank else after
        return known | {"done": (*self.done, after), "sorted_upper": sorted_upper, "best": best}

    def _with_more(self, before: Training, after: Training) -> dict[str, Any]:
        """What is known once something was found out, e.g. a hypergradient, of a training that had ended."""
        # The region that began at it, and the one that it is a member of.
        own = {region for region in (after.index, after.proposal.region) if region in self.regions}
        regions = self.regions | {region: self.regions[region].change(before, after) for region in own}
        done = self.done
        if after.status == "done":
            # `done` is in the order of ends.
            done = put(done, bisect.bisect_left(done, after.finished, key=lambda t: t.finished), after)
        best = after if self.best is before else self.best
        known = {"told": put(self.told, after.finished, after), "done": done, "best": best, "regions": regions}
        return known | {name: getattr(self, name) for name in ("pending", "sorted_upper")}

    def _knowing(self, worked_out: Mapping[str, Any]) -> SearchState:
        """With what need not be worked out again."""
        for name, value in worked_out.items():
            # Where `cached_property` keeps values. Setting an attribute is refused, as the class is frozen.
            self.__dict__.setdefault(name, value)
        return self

    def __getstate__(self) -> bytes:
        """Without what can be worked out again; as bytes, one pickle after the other, since Ray's pickler would look at
        every object in Python."""
        return b"".join(record.pickled for record in (*self.trainings, *self.steps))

    def __setstate__(self, state: bytes) -> None:
        file = io.BytesIO(state)
        records = []
        # In the order in which they were written, so that places in the tuples are indices again.
        while file.tell() < len(state):
            records.append(pickle.load(file))
        self.__dict__.update(
            trainings=tuple(record for record in records if isinstance(record, Training)),
            steps=tuple(record for record in records if isinstance(record, StepRecord)),
        )

    def without_last(self) -> SearchState:
        """As if the newest training had never been asked."""
        return replace(self, trainings=self.trainings[:-1])


def put(trainings: tuple[Training, ...], place: int, training: Training) -> tuple[Training, ...]:
    """With another one in that place."""
    return (*trainings[:place], training, *trainings[place + 1 :])


def expected_after(training: Training) -> float:
    """F by the model that proposed a training, once it has seen the training too."""
    predicted, gain = training.proposal.predicted_upper_loss, training.proposal.gain
    if predicted is None or gain is None:
        return training.upper_loss
    return predicted + gain * (training.upper_loss - predicted)


def or_zero(entry: float) -> float:
    """An entry of a gradient; 0 where it is not known."""
    return 0.0 if math.isnan(entry) else entry
