"""The published scheme against a slow reference: loops over plain numbers, written from the formulas alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from raybilevel._lower.training import load_checkpoint, train
from raybilevel._models.value_function import ValueFunction, fit_value_function
from raybilevel.errors import ConfigError, NotFiniteError
from raybilevel.methods import Paper
from raybilevel.search import _local as local
from raybilevel.search._optimizer import BilevelOptimizer
from raybilevel.search_state import Proposal, SearchState, StepRecord, Training
from tests.problems_for_tests import Ridge, unit_box, vector

SEED = 3


class Reference:
    """L = F + (r/2) c^2 + mu c with c = f - v_hat, by momentum steps in z = ln x and y; everything in numpy.

    It shares the Gaussian process of v_hat with the method, and the random numbers that shuffle the batches.
    """

    def __init__(self, problem: Ridge, method: Paper, x: np.ndarray, y: np.ndarray) -> None:
        self.problem, self.method = problem, method
        self.A, self.t, self.B, self.u = (tensor.numpy() for tensor in (*problem.lower, *problem.upper))
        self.low, self.high = math.log(1e-3), math.log(10.0)
        self.z, self.y = np.log(x), y
        self.mu, self.r = method.multiplier, method.penalty
        self.pair: tuple[float, float] | None = None

    @property
    def unit(self) -> np.ndarray:
        return (self.z - self.low) / (self.high - self.low)

    def v(self, v_hat: ValueFunction) -> tuple[float, np.ndarray]:
        unit = torch.tensor(self.unit, requires_grad=True)
        mean = v_hat.mean(unit)
        (slope,) = torch.autograd.grad(mean, unit)
        return mean.item(), slope.numpy() / (self.high - self.low)

    def F(self, y: np.ndarray) -> float:  # noqa: N802
        return float(np.mean((self.B @ y - self.u) ** 2) / 2)

    def c(self, v_hat: ValueFunction) -> float:
        f = np.mean((self.A @ self.y - self.t) ** 2) / 2 + np.exp(self.z) @ self.y**2 / 2
        return float(f - self.v(v_hat)[0])

    def batches(self, rows: int, generator: torch.Generator) -> Iterator[np.ndarray]:
        size = self.problem.batch
        while True:
            if size is None:
                yield np.arange(rows)
                continue
            order = torch.randperm(rows, generator=generator).numpy()
            yield from (order[i : i + size] for i in range(0, rows, size))

    def clipped(self, gradient: np.ndarray) -> np.ndarray:
        # torch adds 1e-6 to the norm, against a division by zero
        return gradient * min(1.0, self.method.clip / (np.linalg.norm(gradient) + 1e-6))

    def descend(self, v_hat: ValueFunction, rate: float, momentum: float, generator: torch.Generator) -> None:
        above, below = self.batches(len(self.B), generator), self.batches(len(self.A), generator)
        speed_z, speed_y = np.zeros_like(self.z), np.zeros_like(self.y)
        for _ in range(self.method.steps):
            i, j = next(above), next(below)
            x, y = np.exp(self.z), self.y
            error = self.A[j] @ y - self.t[j]
            v, slope = self.v(v_hat)
            c = np.mean(error**2) / 2 + x @ y**2 / 2 - v
            force = self.r * c + self.mu
            in_y = self.B[i].T @ (self.B[i] @ y - self.u[i]) / len(i) + force * (self.A[j].T @ error / len(j) + x * y)
            in_z = force * (x * y**2 / 2 - slope)
            speed_z = momentum * speed_z + self.clipped(in_z)
            speed_y = momentum * speed_y + self.clipped(in_y)
            self.z = np.clip(self.z - rate * speed_z, self.low, self.high)
            self.y = self.y - rate * speed_y

    def step(self, v_hat: ValueFunction, seed: int) -> float:
        """One outer iteration; |c|."""
        generator = torch.Generator().manual_seed(seed)
        start = self.z, self.y
        if self.pair is None:
            scores = {}
            for pair in itertools.product(self.method.learning_rates, self.method.momenta):
                self.descend(v_hat, *pair, generator)
                c = self.c(v_hat)
                scores[pair] = self.F(self.y) + self.r / 2 * c**2 + self.mu * c
                self.z, self.y = start
            self.pair = min(scores, key=lambda pair: scores[pair])
        self.descend(v_hat, *self.pair, generator)
        c = self.c(v_hat)
        self.mu, self.r = self.mu + self.r * c, self.method.growth * self.r
        return abs(c)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


SCHEMES: dict[str, tuple[Ridge, Paper]] = {
    "all data": (
        Ridge(dimension=2),
        Paper(iterations=3, steps=15, learning_rates=(0.02, 0.1), momenta=(0.1, 0.9)),
    ),
    "minibatches": (
        Ridge(dimension=2, batch=5, epochs=5, optimizer=sgd),
        Paper(iterations=2, steps=15, learning_rates=(0.02, 0.05), momenta=(0.5, 0.9)),
    ),
    "clipped": (
        Ridge(dimension=1),
        Paper(iterations=2, steps=25, clip=0.01, learning_rates=(0.3,), momenta=(0.9,), multiplier=5.0, growth=3.0),
    ),
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_each_iterate_is_the_references(scheme: str):
    problem, method = SCHEMES[scheme]
    optimizer = BilevelOptimizer(problem.space, method, SEED)
    checkpoints = local.search(problem, optimizer, cost=math.inf)
    state, design = optimizer.state, 5**problem.dimension
    start = min(state.trainings[:design], key=lambda t: t.upper_loss)
    y = load_checkpoint(checkpoints[start.index])["model"]["weight"][0].numpy()
    reference = Reference(problem, method, problem.values(vector(*start.unit)).numpy(), y)
    assert len(state.steps) == method.iterations
    for k, record in enumerate(state.steps):
        v_hat = fit_value_function(state.trainings[: design + k], vector(0.0), False, 10**6)
        before = np.append(reference.unit, reference.y)
        violation = reference.step(v_hat, SEED + 1000 * k)
        assert np.abs(np.append(reference.unit, reference.y) - before).max() > 1e-4  # else agreement would mean little
        # a hundred steps, each with some roundings of 1e-16 and a solve of condition 1e8 in v_hat
        assert state.trainings[design + k].unit == pytest.approx(reference.unit.tolist(), abs=1e-6)
        assert record.multiplier == pytest.approx(reference.mu, rel=1e-6)
        assert record.penalty == pytest.approx(reference.r, rel=1e-12)
        assert record.violation == pytest.approx(violation, abs=1e-6)
        assert (record.rate, record.momentum) == reference.pair


# Where it starts, what it counts, when it ends.


def trained(index: int, upper: float, origin: str = "start", violation: float | None = None) -> Training:
    proposal = Proposal((0.1 * index,), origin, violation=violation)
    return Training(index, proposal, "done", index, lower_loss=1.0, upper_loss=upper, lower_gradient=(0.0,), passes=1.0)


@pytest.mark.parametrize(("dimension", "count"), [(1, 5), (2, 25), (3, 25), (8, 25)])
def test_the_start_design(dimension: int, count: int):
    design = Paper().start_design(unit_box(dimension), 7, 0)
    assert design.shape == (count, dimension)
    assert bool(((design >= 0) & (design <= 1)).all())


def test_the_grid():
    ticks = [0.0, 0.25, 0.5, 0.75, 1.0]
    assert Paper().start_design(unit_box(1), 1, 0).flatten().tolist() == ticks
    assert sorted(Paper().start_design(unit_box(2), 1, 0).tolist()) == [[a, b] for a in ticks for b in ticks]


def test_it_starts_at_the_lowest_f_of_the_design_and_needs_its_weights_once():
    state = SearchState((trained(0, 3.0), trained(1, 2.0), trained(2, 1.0, "region", 0.1)))
    step = Paper().plan(state, (), 1, seed=5)
    assert step is not None
    assert (step.number, step.centre, step.targets, step.seed) == (0, 1, (1,), 5)
    later = SearchState(state.trainings, (StepRecord(0, 1, 1.0, multiplier=2.5, penalty=3.0),))
    step = Paper().plan(later, (), 1, seed=5)
    assert step is not None
    assert (step.number, step.centre, step.targets, step.seed) == (1, 1, (), 1005)


def test_it_takes_one_step_at_a_time():
    state = SearchState((trained(0, 3.0),))
    step = Paper().plan(state, (), 4, 0)
    assert step is not None
    assert Paper().plan(SearchState(), (), 4, 0) is None
    assert Paper().plan(state, (step,), 4, 0) is None
    assert Paper().plan(state.add(Proposal((0.5,), "region")), (), 4, 0) is None


def test_it_ends_after_its_iterations():
    steps = tuple(StepRecord(k, 0, 1.0, multiplier=2.0) for k in range(2))
    state = SearchState((trained(0, 3.0),), steps)
    assert Paper(iterations=2).exhausted(state) and Paper(iterations=2).plan(state, (), 1, 0) is None
    assert not Paper(iterations=3).exhausted(state)


def test_the_result_is_the_iterate_with_the_smallest_violation():
    design = (trained(0, 3.0), trained(1, 1.0))
    best = Paper().incumbent(SearchState(design))
    assert best is not None and best.index == 1
    iterates = (trained(2, 2.0, "region", 0.2), trained(3, 9.0, "region", 0.0), trained(4, 1.5, "region", 0.1))
    best = Paper().incumbent(SearchState(design + iterates))
    assert best is not None and best.index == 3
    assert Paper().incumbent(SearchState()) is None


def test_what_the_steps_cost():
    problem, method = Ridge(dimension=1), Paper(iterations=2, steps=10, learning_rates=(0.02, 0.05), momenta=(0.5,))
    optimizer = BilevelOptimizer(problem.space, method, SEED)
    local.search(problem, optimizer, cost=math.inf)
    descent = 10 * (12 + 30) / 12  # steps, examples of both levels, in passes over the lower one's
    assert [step.passes for step in optimizer.state.steps] == pytest.approx([3 * descent, descent], rel=1e-12)


def test_x_is_kept_in_its_box():
    problem = Ridge(dimension=1)
    method = Paper(iterations=1, steps=50, multiplier=-50.0, learning_rates=(1.0,), momenta=(0.9,))
    optimizer = BilevelOptimizer(problem.space, method, SEED)
    local.search(problem, optimizer, cost=math.inf)
    assert optimizer.state.trainings[-1].unit == pytest.approx((0.0,), abs=1e-15)  # as far as it could


def test_a_grid_that_diverges_throughout_is_an_error():
    problem = Ridge(dimension=1)
    optimizer = BilevelOptimizer(problem.space, Paper(learning_rates=(1e200,), momenta=(0.5,)), SEED)
    config = optimizer.ask("0")
    assert config is not None
    trained, checkpoint = train(problem, config)
    optimizer.queue.clear()
    optimizer.tell("0", local.observe(problem.space, config, trained))
    step = optimizer.plan()
    assert step is not None
    with pytest.raises(NotFiniteError, match="every learning rate and momentum"):
        optimizer.method.run(problem, problem.space, {}, step, lambda index: load_checkpoint(checkpoint))


@pytest.mark.parametrize(
    "settings",
    [
        {"iterations": 0},
        {"steps": 0},
        {"penalty": 0.0},
        {"growth": -1.0},
        {"clip": math.nan},
        {"learning_rates": ()},
        {"momenta": ()},
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any]):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        Paper(**settings)
