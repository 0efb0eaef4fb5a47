"""Every gradient that is taken is charged: a counting problem against the ledger, for all methods and optimizers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from benchmarks.objective import Objective
from benchmarks.reference import lbfgsb_centre
from raybilevel._lower.linearisation import Linearisation
from raybilevel._lower.passes import Passes
from raybilevel._lower.training import train
from raybilevel.hypergradient._descent import BilevelDescent
from raybilevel.methods import Default, Paper
from raybilevel.methods._hypergradient import HypergradientDescent
from raybilevel.problem import Hyperparameters, Level
from raybilevel.search import _local as local
from raybilevel.search._optimizer import BilevelOptimizer
from tests.problems_for_tests import Logistic, vector


class Tap(torch.autograd.Function):
    """A loss as it is; says when it is differentiated."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, seen: Callable[[bool], None]) -> Tensor:
        ctx.seen = seen
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ctx.seen(torch.is_grad_enabled())
        return gradients[0], None


class Counting(Logistic):
    """Writes down the examples whose gradient is really taken.

    taken:  by level, those of gradients alone.
    within: of gradients with a graph, which products with second derivatives differentiate.
    """

    def __init__(self, dimension: int = 2, **settings: Any) -> None:
        super().__init__(dimension, rows=12, **settings)
        self.taken: Counter[Level] = Counter()
        self.within: Counter[Level] = Counter()

    def tapped(self, level: Level, loss: Tensor, batch: Any) -> Tensor:
        def seen(with_graph: bool) -> None:
            (self.within if with_graph else self.taken)[level] += len(batch[0])

        tapped: Tensor = Tap.apply(loss, seen)  # type: ignore[no-untyped-call]
        return tapped

    def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Any) -> Tensor:
        loss = self.data_loss(model, batch)
        weights = model.get_parameter("weight")[0]
        penalty = (self.decay(hyperparameters) * weights.square()).sum() / 2
        return self.tapped("lower", loss + penalty, batch)

    def upper_loss(self, model: nn.Module, batch: Any) -> Tensor:
        return self.tapped("upper", self.data_loss(model, batch), batch)

    @staticmethod
    def data_loss(model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.softplus(-batch[1].sign() * model(batch[0]).squeeze(-1)).mean()

    @property
    def passes(self) -> float:
        """All that was taken, in gradients of f, but for products with second derivatives."""
        return (self.taken["lower"] + self.taken["upper"]) / len(self.lower[0])


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=0.3),
    "Adam": lambda model: torch.optim.Adam(model.parameters(), lr=0.05),
    "L-BFGS": lambda model: torch.optim.LBFGS(model.parameters(), max_iter=7, line_search_fn="strong_wolfe"),
}
SAME = 1e-12
"""Relative: sums of a few hundred shares of passes."""


@pytest.fixture(params=OPTIMIZERS)
def optimizer(request: pytest.FixtureRequest) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return OPTIMIZERS[request.param]


@pytest.fixture(params=[None, 5], ids=["one batch", "minibatches"])
def problem(request: pytest.FixtureRequest, optimizer: Any) -> Counting:
    # More of gradient descent, whose trainings are too short for hypergradients otherwise.
    return Counting(batch=request.param, optimizer=optimizer, epochs=6 if optimizer is OPTIMIZERS["L-BFGS"] else 24)


class Products:
    """How many products with second derivatives are asked for."""

    names: ClassVar[tuple[str, ...]] = ("hessian", "mixed", "mixed_transposed")

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        for name in self.names:
            monkeypatch.setattr(Linearisation, name, self.counted(getattr(Linearisation, name)))

    def counted(self, product: Callable[[Linearisation, Tensor], Tensor]) -> Callable[[Linearisation, Tensor], Tensor]:
        def wrapped(linear: Linearisation, direction: Tensor) -> Tensor:
            self.count += 1
            return product(linear, direction)

        return wrapped


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> Products:
    return Products(monkeypatch)


def test_a_training_is_charged_its_epochs_and_the_gradient_at_the_end(problem: Counting) -> None:
    trained, _ = train(problem, problem.config(vector(0.1, 0.5)))
    assert trained.passes == pytest.approx(problem.passes, rel=SAME)
    assert problem.taken["upper"] == 0
    if "LBFGS" not in type(problem.optimizer(problem.model())).__name__:
        assert trained.passes == problem.epochs + 1


def test_an_optimistic_training(problem: Counting) -> None:
    problem.optimistic = True
    trained, _ = train(problem, problem.config(vector(0.1, 0.5)))
    assert trained.passes == pytest.approx(problem.passes, rel=SAME)
    assert problem.taken["upper"] > 0


METHODS = {
    "default": Default(),
    "paper": Paper(iterations=2, steps=10, learning_rates=(0.02, 0.05), momenta=(0.5,)),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_search(problem: Counting, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        local, "check_search", lambda _, space, *rest: space
    )  # tried once, on a batch: no part of the search
    if method == "paper":  # whose start design has 25 points in two dimensions
        problem = Counting(1, batch=problem.batch, optimizer=problem.make_optimizer, epochs=problem.epochs)
    search = BilevelOptimizer(problem.space, METHODS[method], 0)
    local.search(problem, search, 12 if method == "paper" else 5)
    state = search.state
    assert any(step.passes > 0 for step in state.steps)
    charged = sum(training.passes for training in state.trainings) + sum(step.passes for step in state.steps)
    assert charged == pytest.approx(problem.passes, rel=SAME)
    assert not problem.within  # first derivatives alone


ESTIMATORS: dict[str, dict[str, Any]] = {
    "cg": {"solver": "cg"},
    "minres": {"solver": "minres"},
    "recycled": {"solver_settings": {"selection": {"strategy": "ritz_generalized_singular", "dimension": 1}}},
    "neumann": {"solver": "neumann", "solver_settings": {"terms": 5}},
    "reverse": {"estimator": "unrolled", "estimator_settings": {"steps": 5}},
    "forward": {"estimator": "unrolled", "estimator_settings": {"steps": 5, "mode": "forward"}},
    "first_order": {"estimator": "first_order"},
    "dynamic_barrier": {"estimator": "dynamic_barrier"},
}


@pytest.mark.parametrize("lower", ["optimizer", "tolerance"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_descent_along_hypergradients(problem: Counting, estimator: str, lower: Any, products: Products) -> None:
    settings = HypergradientDescent(steps=3, lower=lower, **ESTIMATORS[estimator])
    descent = BilevelDescent(problem, problem.config(vector(0.1, 0.5)), settings, problem.space)
    while not descent.finished:
        descent.run_step()
        assert descent.products == products.count
    descent.conclude()
    assert descent.passes == pytest.approx(problem.passes + products.count, rel=SAME)
    # A product is charged with the gradient that it differentiates; there are no others with a graph.
    assert problem.within["lower"] <= len(problem.lower[0]) * products.count


def test_the_reference_of_the_benchmark(problem: Counting, products: Products) -> None:
    objective = Objective(problem, problem.space, 0, 5)
    with pytest.raises(Exception, match=r"^$"):
        lbfgsb_centre(objective, 0)
    charged = sum(observed.passes for observed in objective.observed) + objective.charged
    assert charged == pytest.approx(problem.passes + products.count, rel=SAME)
    assert products.count > 0


def test_a_ledger_counts_passes_over_the_lower_level() -> None:
    ledger = Passes()
    assert ledger.count == 0
    ledger.charge(6)
    assert ledger.count == 1  # as long as nobody knows better
    ledger.whole = 12
    ledger.charge(12)
    assert ledger.count == 1.5
