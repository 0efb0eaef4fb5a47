"""The benchmark's config: problems x methods x seeds; and one run of it."""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from benchmarks import peers, reference
from benchmarks.descent import descent
from benchmarks.lago import lago
from benchmarks.newsgroups import Newsgroups
from benchmarks.objective import BudgetSpent, Objective
from benchmarks.ours import bilevel, configured
from benchmarks.regularised import RegularisedNetwork
from benchmarks.turbo import turbo
from raybilevel._config.files import read_mapping, validated
from raybilevel._lower.training import refit, train
from raybilevel._metrics import UPPER_LOSS, problem_metrics
from raybilevel._records.incumbents import incumbent_at
from raybilevel._records.record import Observation, Record, Settings, Spent, Step, box
from raybilevel._records.store import path_of
from raybilevel._records.versions import core_digest, versions
from raybilevel.errors import ConfigError, NotFiniteError, RaybilevelError
from raybilevel.methods import METHODS
from raybilevel.problem import BilevelProblem
from raybilevel.problems.banded_ridge import BandedRidge
from raybilevel.problems.cifar import CifarLenet
from raybilevel.problems.cleaning import HyperCleaning
from raybilevel.problems.digits import DigitsLogistic
from raybilevel.problems.income import Income
from raybilevel.problems.long_tail import LongTailed
from raybilevel.problems.mnist import Mnist, Mnist1K
from raybilevel.problems.mnist_kinds import Mnist1KKinds
from raybilevel.problems.ridge import Ridge
from raybilevel.problems.synthetic import ManyMinimisers, SeveralOptima
from raybilevel.search import ForRefit, config_for_refit
from raybilevel.search_state import Shrinkage
from raybilevel.space import Space

PEER_PACKAGES = ("scipy", "optuna", "cmaes")

PROBLEMS: dict[str, Callable[..., BilevelProblem]] = {
    "banded_ridge": BandedRidge,
    "cifar_lenet": CifarLenet,
    "cleaning": HyperCleaning,
    "digits_logistic": DigitsLogistic,
    "income": Income,
    "long_tail": LongTailed,
    "many_minimisers": ManyMinimisers,
    "mnist": Mnist,
    "mnist_1k": Mnist1K,
    "mnist_1k_kinds": Mnist1KKinds,
    "newsgroups": Newsgroups,
    "regularised_network": RegularisedNetwork,
    "ridge": Ridge,
    "several_optima": SeveralOptima,
}


@dataclass(frozen=True)
class Peer:
    """A method of the benchmark that is not raybilevel's; `dimensions` for which it makes sense.

    search: of an objective, a seed and its settings.
    """

    search: Callable[..., None]
    dimensions: tuple[float, float] = (1, math.inf)


PEERS: dict[str, Peer] = {
    "cma-es": Peer(peers.cma_es),
    "descent": Peer(descent),
    "diagonal": Peer(peers.diagonal, (2, math.inf)),
    "given": Peer(peers.given),
    "grid": Peer(peers.grid, (1, 2)),
    "lago": Peer(lago),
    "lbfgsb-centre": Peer(reference.lbfgsb_centre),
    "lbfgsb-random": Peer(reference.lbfgsb_random),
    "optuna-gp": Peer(peers.optuna_gp),
    "optuna-tpe": Peer(peers.optuna_tpe),
    "qlogei": Peer(peers.qlogei),
    "random": Peer(peers.random),
    "turbo": Peer(turbo),
}


class Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ProblemEntry(Entry):
    """budget: instead of the config's. methods: only these, all if not given. caps: lower budgets by method.

    by_seed: the seed's initial weights decide what F can be (networks trained for some epochs), so F* is a seed's own.
    """

    problem: str
    options: dict[str, Any] = {}
    budget: float | None = Field(default=None, gt=0)
    seeds: int | None = Field(default=None, ge=1)
    methods: tuple[str, ...] | None = None
    caps: dict[str, float] = {}
    by_seed: bool = False

    @model_validator(mode="after")
    def known(self) -> ProblemEntry:
        if self.problem not in PROBLEMS:
            raise ValueError(f"unknown problem {self.problem!r}; choose one of {', '.join(sorted(PROBLEMS))}")
        return self


class MethodEntry(Entry):
    """One method, or an ablation of one.

    settings: other than the method's defaults.
    only:     the problems on which it runs; all if not given.
    budget:   at most; as `caps` of a problem.
    slots:    trainings and upper-level steps at once, on a simulated clock: its cost is the time, in trainings.
    seeds:    at most.
    """

    method: str
    settings: dict[str, Any] = {}
    only: tuple[str, ...] | None = None
    budget: float = Field(math.inf, gt=0)
    slots: int = Field(1, ge=1)
    seeds: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def known(self) -> MethodEntry:
        if self.method in METHODS:
            try:
                configured(self.method, self.settings)
            except (ConfigError, TypeError) as error:
                raise ValueError(str(error)) from error
        elif self.method not in PEERS:
            raise ValueError(f"unknown method {self.method!r}; choose one of {', '.join(sorted([*METHODS, *PEERS]))}")
        elif self.slots > 1:
            raise ValueError(f"method {self.method!r} runs in one slot")
        else:
            try:
                inspect.signature(PEERS[self.method].search).bind(None, 0, **self.settings)
            except TypeError as error:
                raise ValueError(f"settings of the method {self.method!r}: {error}") from error
        return self


class Suite(Entry):
    """budget: cost of a run, in lower-level trainings. marks: costs at which tables report; `overview`: the first."""

    budget: float = Field(100, gt=0)
    seeds: int = Field(3, ge=1)
    marks: tuple[float, ...] = (10, 20, 50, 100)
    overview: tuple[float, ...] = ()
    workers: int = Field(2, ge=1)
    problems: dict[str, ProblemEntry]
    methods: dict[str, MethodEntry]

    @model_validator(mode="after")
    def consistent(self) -> Suite:
        for name, entry in self.problems.items():
            for method in (*(entry.methods or ()), *entry.caps):
                if method not in self.methods:
                    raise ValueError(f"problem {name!r} names the method {method!r}, which is not among `methods`")
        for name, ablation in self.methods.items():
            for problem in ablation.only or ():
                if problem not in self.problems:
                    raise ValueError(f"method {name!r} names the problem {problem!r}, which is not among `problems`")
        return self

    def runs(self, data: str | None) -> list[Run]:
        """All runs, the seeds outermost, so that a part of them is a fair comparison already."""
        found = []
        for seed in range(max(self.seeds, *(p.seeds or 0 for p in self.problems.values()))):
            for problem, entry in self.problems.items():
                for method in self._methods_of(problem):
                    low, high = (1, math.inf) if (peer := self._peer(method)) is None else peer.dimensions
                    budget = min(
                        entry.budget or self.budget, entry.caps.get(method, math.inf), self.methods[method].budget
                    )
                    seeds = min(entry.seeds or self.seeds, self.methods[method].seeds or math.inf)
                    if seed >= seeds or not low <= dimension_of(entry) <= high:
                        continue
                    found.append(Run(problem, entry, method, self.methods[method], seed, budget, self.marks, data))
        return found

    def _methods_of(self, problem: str) -> list[str]:
        allowed = self.problems[problem].methods
        return [
            name
            for name, entry in self.methods.items()
            if (problem in entry.only if entry.only is not None else allowed is None or name in allowed)
        ]

    def _peer(self, method: str) -> Peer | None:
        return PEERS.get(self.methods[method].method)


def read_suite(path: str | Path) -> Suite:
    """A suite from its YAML file.

    Raises:
        ConfigError: it cannot be read, or a key is wrong; the key is named.
    """
    return validated(Suite, read_mapping(path), path)


@dataclass(frozen=True)
class Run:
    """One problem, one method, one seed; `data`, `marks` and `retrainings` have no part in what it is known by.

    retrainings: of each result at a mark, under other seeds of the training.
    """

    problem_name: str
    problem: ProblemEntry
    method_name: str
    method: MethodEntry
    seed: int
    budget: float
    marks: tuple[float, ...]
    data: str | None
    retrainings: int = 0

    @property
    def settings(self) -> Settings:
        """Everything that decides the result."""
        return Settings(
            problem=self.problem.problem,
            options=self.problem.options,
            method=self.method.method,
            method_settings=self.method.settings,
            seed=self.seed,
            budget=self.budget,
            slots=self.method.slots,
        )

    @property
    def path(self) -> Path:
        """Of its record in the output folder."""
        return path_of(self.problem_name, self.method_name, self.settings)


def make_problem(entry: ProblemEntry, data: str | None) -> BilevelProblem:
    """Raises ConfigError, where an option is wrong."""
    kind = PROBLEMS[entry.problem]
    options = dict(entry.options)
    if "data" in _arguments(kind):
        options["data"] = data
    try:
        return kind(**options)
    except TypeError as error:
        raise ConfigError(f"problem {entry.problem!r}: {error}") from error


def _arguments(kind: Callable[..., Any]) -> tuple[str, ...]:
    code = kind.__init__.__code__
    return tuple(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount])


@functools.lru_cache(maxsize=2)
def _cached_problem(key: str, data: str | None) -> BilevelProblem:
    """The same instance for the runs of one worker, so that data are read once."""
    return make_problem(ProblemEntry.model_validate_json(key), data)


def box_of(problem: BilevelProblem) -> Space:
    """Raises ConfigError, where a problem has no box of its own."""
    if problem.space is None:
        raise ConfigError(f"{type(problem).__name__} has no `space` of its own, which a problem of the benchmark needs")
    return problem.space


def dimension_of(entry: ProblemEntry) -> int:
    return box_of(make_problem(entry, ".")).dimension


def execute(run: Run) -> Record:
    """The record of a run; of a failed one, with what it saw before and the error."""
    # Several runs share the machine, one a process.
    torch.set_num_threads(1)
    began = time.perf_counter()
    problem = _cached_problem(
        ProblemEntry(problem=run.problem.problem, options=run.problem.options).model_dump_json(), run.data
    )
    space = box_of(problem)
    # The objective counts trainings, of which `slots` fit into a unit of simulated time.
    objective = Objective(problem, space, run.seed, run.budget * run.method.slots)
    steps: tuple[Step, ...] = ()
    error, exhausted = None, False
    try:
        if run.method.method in METHODS:
            steps = bilevel(objective, run.seed, run.method.method, run.method.settings, run.method.slots)
            # On a simulated clock the cost is the time, and says nothing of the budget.
            exhausted = run.method.slots == 1 and objective.cost < run.budget
        else:
            PEERS[run.method.method].search(objective, run.seed, **run.method.settings)
            exhausted = True
    except BudgetSpent:
        pass
    # Not all exceptions: a TypeError, e.g., is a mistake of the program, and ends the benchmark.
    except (RaybilevelError, ArithmeticError, ValueError, RuntimeError) as raised:
        error = f"{type(raised).__name__}: {raised}"
    observations = objective.observations()
    return Record(
        kind="benchmark",
        status="failed" if error else "done",
        error=error,
        problem_name=run.problem_name,
        method_name=run.method_name,
        settings=run.settings,
        epochs_per_training=problem.epochs,
        space=box(space),
        marks=run.marks,
        optimum=getattr(problem, "optimum", None),
        versions={**versions(PEER_PACKAGES), "core": core_digest()},
        exhausted=exhausted,
        refits={} if error or run.retrainings else _refits(problem, observations, steps, run),
        retrained={} if error else _retrained(problem, observations, run),
        seconds=round(time.perf_counter() - began, 2),
        spent=Spent(epochs=problem.epochs * len(observations)),
        observations=observations,
        steps=steps,
    )


def _refits(
    problem: BilevelProblem, observations: Sequence[Observation], steps: Sequence[Step], run: Run
) -> dict[int, dict[str, float]]:
    """Metrics after a refit with the incumbent's hyperparameters, by the incumbent's position, for each mark.

    Of a method that holds hyperparameters of a kind together, as `config_for_refit` chooses, with its `spread`.
    """
    found: dict[int, dict[str, float]] = {}
    method = run.method.method
    generalises = method in METHODS and getattr(configured(method, run.method.settings), "generalise", False)
    for mark in (*run.marks, run.budget):
        index = incumbent_at(observations, mark)
        if index is None or index in found:
            continue
        chosen = ForRefit(observations[index].hyperparameters)
        if generalises:
            learned = _learned(observations, steps, mark)
            chosen = config_for_refit(problem, chosen.config, box_of(problem), learned, run.seed)
        try:
            metrics = refit(problem, chosen.config, run.seed)
        # A refit that diverges has no metrics.
        except ArithmeticError:
            continue
        if metrics is None:
            return {}
        found[index] = {**metrics, "spread": chosen.spread} if generalises else metrics
    return found


def _retrained(
    problem: BilevelProblem, observations: Sequence[Observation], run: Run
) -> dict[int, tuple[dict[str, float], ...]]:
    """F and metrics of the incumbent's hyperparameters under other seeds of the training, by the incumbent's position,
    for each mark. The seeds are those of every method; a training that diverges is left out."""
    found: dict[int, tuple[dict[str, float], ...]] = {}
    positions = {incumbent_at(observations, mark) for mark in (*run.marks, run.budget)} - {None}
    for index in positions if run.retrainings else ():
        assert index is not None
        trained = []
        for number in range(1, run.retrainings + 1):
            with contextlib.suppress(NotFiniteError):
                one, _ = train(problem, observations[index].hyperparameters, 1000 * number + run.seed)
                trained.append({UPPER_LOSS: one.upper_loss, **problem_metrics(one.metrics)})
        found[index] = tuple(trained)
    return found


def _learned(observations: Sequence[Observation], steps: Sequence[Step], mark: float) -> Shrinkage | None:
    """What the last step learned of groups that had proposed a training at a mark."""
    proposed = [o.trace["step"] for o in observations if o.cost <= mark and o.trace["step"] is not None]
    last = max(proposed, default=-1)
    return next((s.shrinkage for s in reversed(steps) if s.number <= last and s.shrinkage is not None), None)
