"""Graph structure: its formulas by hand, its hypergradient, and that it repairs a small graph."""

from __future__ import annotations

import os
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import one_hot
from torch.nn.utils import parameters_to_vector

from raybilevel._lower.levels import Levels
from raybilevel._lower.variables import ModuleVariables
from raybilevel.errors import ConfigError
from raybilevel.hypergradient import Implicit, LinearSystem, MinimalResidual, solve_lower
from raybilevel.hypergradient._descent import BilevelDescent
from raybilevel.methods._hypergradient import HypergradientDescent
from raybilevel.problems import _datasets as datasets
from raybilevel.problems._datasets import Graph
from raybilevel.problems._sparse import Sparse, pattern
from raybilevel.problems.graph import (
    GIVEN,
    NEIGHBOUR,
    GraphConvolution,
    GraphStructure,
    adjacency,
    nearest,
    normalised,
    undirected,
)

DATA = os.environ.get("RAYBILEVEL_TEST_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="RAYBILEVEL_TEST_DATA does not name a folder with the data sets")


def blocks(nodes: int = 90, classes: int = 3, wrong: float = 0.5) -> Graph:
    """Papers of three topics: weak words, and edges, this share of which go anywhere."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(nodes) % classes
    words = torch.rand(nodes, 12, generator=generator) < 0.2 + 0.15 * one_hot(labels, classes).repeat_interleave(4, 1)
    first = torch.randint(nodes, (4 * nodes,), generator=generator)
    inside = (first + classes * torch.randint(1, nodes // classes, (4 * nodes,), generator=generator)) % nodes
    anywhere = (first + torch.randint(1, nodes, (4 * nodes,), generator=generator)) % nodes
    second = torch.where(torch.rand(4 * nodes, generator=generator) < wrong, anywhere, inside)
    edges = undirected(torch.stack([first, second], 1), nodes)
    numbers = torch.arange(nodes)
    return Graph(words.float(), edges, labels, numbers[:12], numbers[12:60], numbers[60:])


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "planetoid", lambda folder, name: blocks())


def test_the_normalised_graph_by_hand() -> None:
    edges, probabilities = torch.tensor([[0, 1], [1, 2]]), torch.tensor([0.5, 1.0], dtype=torch.double)
    found = normalised(adjacency(edges, 3), probabilities)
    dense = torch.tensor([[1, 0.5, 0], [0.5, 1, 1], [0, 1, 1]], dtype=torch.double)
    scale = torch.diag(dense.sum(1).rsqrt())
    x = torch.randn(3, 2, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(found.times(x), scale @ dense @ scale @ x)


def test_sparse_products_have_first_and_second_derivatives() -> None:
    generator = torch.Generator().manual_seed(0)
    row, column = torch.tensor([3, 0, 3, 1]), torch.tensor([1, 0, 0, 1])  # rows 2 and 4, and column 2, are empty
    where = pattern(row, column, 5, 3)
    entry = torch.randn(4, dtype=torch.double, generator=generator, requires_grad=True)
    dense = torch.randn(3, 2, dtype=torch.double, generator=generator, requires_grad=True)
    matrix = torch.zeros(5, 3, dtype=torch.double).index_put((row, column), entry)
    torch.testing.assert_close(Sparse(where, entry).times(dense), matrix @ dense)
    assert torch.autograd.gradcheck(lambda a, b: Sparse(where, a).times(b), (entry, dense))
    assert torch.autograd.gradgradcheck(lambda a, b: Sparse(where, a).times(b), (entry, dense))


def test_nearest_neighbours_by_hand() -> None:
    features = torch.tensor([[1.0, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 0], [0, 0, 1]])
    # 0 and 2 are nearest to 1, 1 to 0 (the first of two alike); 3 and 4 share no word with another
    assert nearest(features, 1).tolist() == [[0, 1], [1, 2]]
    assert nearest(features, 9).tolist() == [[0, 1], [1, 2]]
    assert undirected(torch.tensor([[2, 1], [1, 2], [0, 3]]), 4).tolist() == [[0, 3], [1, 2]]


class Smooth(GraphStructure):
    """With tanh, since a minimum may lie where a relu bends, and there F has no derivative."""

    def model(self) -> nn.Module:
        class Convolution(GraphConvolution):
            def forward(self, features: Sparse, adjacency: Sparse) -> torch.Tensor:
                hidden = torch.tanh(adjacency.times(features.times(self.weight1)) + self.bias1)
                return adjacency.times(hidden @ self.weight2) + self.bias2

        return Convolution(12, self.hidden, 3)


@pytest.mark.usefixtures("small")
def test_hypergradient_of_edges_against_central_differences() -> None:
    problem = Smooth("data", missing=0.3, neighbours=2, hidden=3, decay=0.03)
    problem.dtype = torch.float64
    torch.manual_seed(0)
    module = problem.upper_variables().double()
    functions = Levels(problem, problem.model().double(), ModuleVariables(module, {}))
    x = parameters_to_vector(module.parameters()).detach()
    model = problem.model().double()

    def solved(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        y = solve_lower(functions, x, y, 1e-7).y
        for _ in range(3):  # Newton's method, as differences need more than L-BFGS gives
            system = LinearSystem(functions.linearise(x, y).hessian, functions.lower(x, y).in_y, lambda v: v)
            y = y - MinimalResidual(1e-12).solve(system, None)[0].solution
        return y

    y = solved(x, parameters_to_vector(model.parameters()).detach())
    found = Implicit(MinimalResidual(1e-11))(functions, x, y)
    for number in (0, len(problem.given) + 1):
        step = torch.zeros_like(x)
        step[number] = 1e-4
        above, below = (functions.upper(p, solved(p, y)).value for p in (x + step, x - step))
        # 1e-5: the differences' truncation
        assert found.gradient[number].item() == pytest.approx((above - below) / 2e-4, rel=1e-5, abs=1e-8)


@pytest.mark.usefixtures("small")
def test_a_descent_lowers_the_loss_of_nodes_that_neither_level_sees() -> None:
    problem = GraphStructure("data", missing=0.3, neighbours=3, hidden=8, decay=0.01)
    problem.epochs = 2
    settings = {"tolerance": 3e-2, "limit": 10}
    descent = BilevelDescent(problem, {"start": 0.0}, HypergradientDescent(steps=4, rate=0.1, solver_settings=settings))
    first = descent.run_step()
    while not descent.finished:
        descent.run_step()
    assert descent.last["selection_loss"] < first["selection_loss"] and descent.last["upper_loss"] < first["upper_loss"]
    found = descent.conclude()
    probabilities = problem.upper_variables()
    with torch.no_grad():
        probabilities.logits.copy_(descent.best[1])
    # the same first weights; sums in another order
    again = problem.accuracies(problem.candidates, probabilities())
    assert again["test"] == pytest.approx(found["test_accuracy"], abs=0.1)
    assert problem.accuracies(problem.given)["test"] == found["given_accuracy"]
    assert 0 < found["homophily"] < 1 and 0 < found["edges"] < len(problem.candidates)


@pytest.mark.usefixtures("small")
def test_candidates_and_parts() -> None:
    problem = GraphStructure("data", missing=0.25, neighbours=2)
    edges, given = blocks().edges, problem.given
    assert len(given) == round(0.75 * len(edges))
    assert torch.equal(problem.candidates[: len(given)], given)
    assert len(torch.unique(problem.candidates, dim=0)) == len(problem.candidates) > len(given)
    start = problem.start_probabilities()
    assert set(start.tolist()) == {torch.tensor(p).item() for p in (GIVEN, NEIGHBOUR)}
    parts = problem.parts
    assert len(parts["upper"]) == len(parts["selection"]) == 24
    together = torch.cat([parts[name] for name in ("lower", "upper", "selection", "test")])
    assert together.sort().values.tolist() == list(range(90))
    other = GraphStructure("data", missing=0.25, neighbours=2, data_seed=1)
    assert not torch.equal(other.given, given)
    empty = GraphStructure("data", missing=1.0, neighbours=2)
    assert len(empty.given) == 0 and len(empty.candidates) > 0
    assert set(pickle.loads(pickle.dumps(problem)).__dict__) == set(GraphStructure("data").__dict__)


@pytest.mark.parametrize("options", [{"graph": "pubmed"}, {"missing": 1.5}, {"neighbours": 0}, {"decay": 0.0}])
def test_wrong_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        GraphStructure("data", **options)
    with pytest.raises(ConfigError, match="--data"):
        GraphStructure()


@pytest.mark.slow
@needs_data
def test_learned_edges_beat_given_ones_and_nearest_neighbours_on_cora() -> None:
    """As in LDS (arXiv:1903.11960); measured: 0.749 against 0.689 and 0.666."""
    method = HypergradientDescent(steps=10, rate=0.1, solver_settings={"tolerance": 3e-2, "limit": 20})
    descent = BilevelDescent(GraphStructure(DATA, missing=0.75), {"start": 0.0}, method)
    while not descent.finished:
        descent.run_step()
    found = descent.conclude()
    assert found["test_accuracy"] > max(found["given_accuracy"], found["neighbour_accuracy"]) + 0.02
