"""Graph structure: edge probabilities for a graph convolutional network on a citation graph with missing edges."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from raybilevel.errors import ConfigError
from raybilevel.problem import Hyperparameters, LargeUpperLevel, Level, move
from raybilevel.problems import _datasets as datasets
from raybilevel.problems._classification import check_positive, data_folder
from raybilevel.problems._sparse import Pattern, Sparse, pattern

GIVEN, NEIGHBOUR, ONLY_NEIGHBOUR = 0.9, 0.1, 0.5
"""Initial probabilities: of a given edge, of a nearest neighbour beside given edges, and of one without any."""


class Nodes(NamedTuple):
    """A batch of nodes.

    nodes, labels: numbers and labels of some nodes, int64, (b,).
    features:      of all nodes, (n, f).
    graph:         the pattern of the graph of the candidate edges.
    """

    nodes: Tensor
    labels: Tensor
    features: Sparse
    graph: Pattern


class GraphConvolution(nn.Module):
    """A relu(A X W1 + b1) W2 + b2 (Kipf & Welling 2017, equation (9)), for a given graph A."""

    def __init__(self, features: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.weight1, self.bias1 = nn.Parameter(torch.empty(features, hidden)), nn.Parameter(torch.zeros(hidden))
        self.weight2, self.bias2 = nn.Parameter(torch.empty(hidden, classes)), nn.Parameter(torch.zeros(classes))
        for weight in (self.weight1, self.weight2):
            nn.init.xavier_uniform_(weight)

    def forward(self, features: Sparse, adjacency: Sparse) -> Tensor:
        hidden = torch.relu(adjacency.times(features.times(self.weight1)) + self.bias1)
        return adjacency.times(hidden @ self.weight2) + self.bias2


class EdgeProbabilities(nn.Module):
    """The upper-level variable: the logits of the candidate edges' probabilities, (m,)."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.logit(start) + 0.01 * torch.randn(len(start)))

    def forward(self) -> Tensor:
        return torch.sigmoid(self.logits)


class GraphStructure(LargeUpperLevel):
    """A graph convolutional network on Cora or Citeseer, with a share of the edges missing:

        f(x, y) = CE on the training nodes + decay |y|^2 / 2,    F(x, y) = CE on half of the validation nodes,

    The network's graph is the expected one, D^-1/2 (P(x) + I) D^-1/2, with the probabilities P of the candidate edges.
    Candidates are the edges that are left, and those to the nearest neighbours in the features. This follows
    Franceschi, Niepert, Pontil & He 2019 (LDS, arXiv:1903.11960), who draw graphs and learn the probabilities of all
    pairs of nodes. x has tens of thousands of variables and F only a few hundred nodes. Against overfitting the other
    half of the validation nodes selects the x (selection loss), as in their work.

    data:       the folder of the data files.
    graph:      "cora" or "citeseer".
    missing:    share of the edges that is removed.
    neighbours: number of nearest neighbours of each node.
    data_seed:  of the edges removed, and of the halves of the validation nodes.
    """

    epochs = 10  # of 20 iterations each

    def __init__(
        self,
        data: str | None = None,
        graph: str = "cora",
        missing: float = 0.75,
        neighbours: int = 20,
        hidden: int = 16,
        decay: float = 3e-3,
        data_seed: int = 0,
    ) -> None:
        check_positive(neighbours=neighbours, hidden=hidden, decay=decay)
        if graph not in datasets.PLANETOID or not 0 <= missing <= 1:
            raise ConfigError(
                f"graph is one of {', '.join(datasets.PLANETOID)} and missing from 0 to 1; got {graph!r}, {missing}"
            )
        self.data = data_folder(self, data)
        self.graph, self.missing, self.neighbours = graph, missing, neighbours
        self.hidden, self.decay, self.data_seed = hidden, decay, data_seed

    @cached_property
    def citations(self) -> datasets.Graph:
        return datasets.planetoid(self.data, self.graph)

    @cached_property
    def features(self) -> Sparse:
        """Bags of words, scaled to norm 1."""
        words = self.citations.features
        # A row may be empty.
        words = words / words.norm(dim=1, keepdim=True).clamp_min(1e-12)
        row, column = words.nonzero(as_tuple=True)
        return Sparse(pattern(row, column, *words.shape), words[row, column])

    @property
    def count(self) -> int:
        """The number of nodes."""
        return len(self.citations.labels)

    @cached_property
    def given(self) -> Tensor:
        """The edges that are left, (m, 2)."""
        edges = self.citations.edges
        order = torch.randperm(len(edges), generator=torch.Generator().manual_seed(self.data_seed))
        return undirected(edges[order[: round((1 - self.missing) * len(edges))]], self.count)

    @cached_property
    def near(self) -> Tensor:
        """The edges to nearest neighbours, (m, 2)."""
        return nearest(self.citations.features, self.neighbours)

    @cached_property
    def candidates(self) -> Tensor:
        """The given edges first, then those to nearest neighbours that are not among them, (m, 2)."""
        near, nodes = self.near, self.count
        # An edge (i, j) as one number, i n + j.
        code = torch.tensor([nodes, 1])
        return torch.cat([self.given, near[~torch.isin(near @ code, self.given @ code)]])

    @cached_property
    def pattern(self) -> Pattern:
        return adjacency(self.candidates, self.count)

    @cached_property
    def parts(self) -> dict[str, Tensor]:
        """The numbers of the nodes of each part. "labelled" is "lower" and "upper" together."""
        found = self.citations
        generator = torch.Generator().manual_seed(self.data_seed)
        mixed = found.validation[torch.randperm(len(found.validation), generator=generator)]
        upper, selection = mixed.split(-(-len(mixed) // 2))  # rounded up, else an odd number makes three parts
        labelled = torch.cat([found.train, upper])
        parts = {"lower": found.train, "upper": upper, "selection": selection, "test": found.test}
        return {**parts, "validation": found.validation, "labelled": labelled}

    def __getstate__(self) -> dict[str, Any]:
        """The state without the data: little is sent to a worker, which reads the data itself."""
        read = ("citations", "features", "given", "near", "candidates", "pattern", "parts")
        return {name: value for name, value in self.__dict__.items() if name not in read}

    def batches(self, level: Level, generator: torch.Generator | None) -> Iterator[Nodes]:
        yield self.nodes(level)

    def nodes(self, part: str) -> Nodes:
        nodes = self.parts[part]
        return Nodes(nodes, self.citations.labels[nodes], self.features, self.pattern)

    def model(self) -> nn.Module:
        found = self.citations
        return GraphConvolution(found.features.shape[1], self.hidden, int(found.labels.max()) + 1)

    def start_probabilities(self) -> Tensor:
        """The initial probabilities of the candidate edges, (m,)."""
        start = torch.full((len(self.candidates),), NEIGHBOUR if len(self.given) else ONLY_NEIGHBOUR)
        # The given edges come first in `candidates`.
        start[: len(self.given)] = GIVEN
        return start

    def upper_variables(self) -> nn.Module:
        return EdgeProbabilities(self.start_probabilities())

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(model.parameters(), max_iter=20, history_size=20, line_search_fn="strong_wolfe")

    def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Nodes) -> Tensor:
        return self.upper_loss(model, hyperparameters, batch) + self.penalty(model)

    def penalty(self, model: nn.Module) -> Tensor:
        """decay |y|^2 / 2."""
        return self.decay / 2 * torch.stack([part.square().sum() for part in model.parameters()]).sum()

    def upper_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Nodes) -> Tensor:
        graph = normalised(batch.graph, hyperparameters["upper"]())
        return cross_entropy(model(batch.features, graph)[batch.nodes], batch.labels)

    def selection_loss(self, model: nn.Module, hyperparameters: Hyperparameters) -> float:
        batch = move(self.nodes("selection"), self.device, self.dtype)
        return self.upper_loss(model, hyperparameters, batch).item()

    def evaluate(self, model: nn.Module, hyperparameters: Hyperparameters) -> dict[str, float]:
        """Loss and accuracy on the test nodes, and more.

        `edges` is the expected number of edges, `homophily` the share of them between papers on one topic. Test
        accuracies of the same network on other graphs are `given_accuracy`, on the edges that are left,
        `neighbour_accuracy`, on those to nearest neighbours, and `refit_accuracy`, on the learned ones with the nodes
        of F as further training nodes.
        """
        batch = move(self.nodes("test"), self.device, self.dtype)
        probabilities = hyperparameters["upper"]()
        logits = model(batch.features, normalised(batch.graph, probabilities))[batch.nodes]
        ends = self.citations.labels[self.candidates].to(probabilities.device)
        same = (ends[:, 0] == ends[:, 1]).to(probabilities)
        return {
            "test_loss": cross_entropy(logits, batch.labels).item(),
            "test_accuracy": (logits.argmax(1) == batch.labels).double().mean().item(),
            "edges": probabilities.sum().item(),
            "homophily": ((probabilities * same).sum() / probabilities.sum()).item(),
            "given_accuracy": self.accuracies(self.given)["test"],
            "neighbour_accuracy": self.accuracies(self.near)["test"],
            "refit_accuracy": self.accuracies(self.candidates, probabilities, "labelled")["test"],
        }

    def accuracies(
        self, edges: Tensor, probabilities: Tensor | None = None, part: str = "lower", seed: int = 0
    ) -> dict[str, float]:
        """Accuracies on each part of the nodes after a training on the nodes of one part, on a fixed graph.

        edges: (m, 2); probabilities: (m,), 1 by default.
        """
        weights = torch.ones(len(edges), dtype=self.dtype) if probabilities is None else probabilities.detach()
        batch = move(self.nodes(part), self.device, self.dtype)
        graph = normalised(move(adjacency(edges, self.count), self.device, self.dtype), weights.to(self.device))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.model().to(self.device, self.dtype)
        optimizer = self.optimizer(model)

        def closure() -> float:
            optimizer.zero_grad()
            loss = cross_entropy(model(batch.features, graph)[batch.nodes], batch.labels) + self.penalty(model)
            loss.backward()
            return loss.item()

        with torch.enable_grad():
            for _ in range(self.epochs):
                optimizer.step(closure)
        with torch.no_grad():
            predicted = model(batch.features, graph).argmax(1).cpu()
        labels = self.citations.labels
        return {name: (predicted[part] == labels[part]).double().mean().item() for name, part in self.parts.items()}


def adjacency(edges: Tensor, nodes: int) -> Pattern:
    """The pattern of P + I: the undirected edges (i, j), (m, 2), each once, then all (j, i), then the diagonal."""
    loops = torch.arange(nodes)
    row, column = torch.cat([edges[:, 0], edges[:, 1], loops]), torch.cat([edges[:, 1], edges[:, 0], loops])
    return pattern(row, column, nodes, nodes)


def normalised(graph: Pattern, probabilities: Tensor) -> Sparse:
    """D^-1/2 (P + I) D^-1/2 for edges with these probabilities, (m,). D has the row sums of P + I."""
    nodes = len(graph.row_starts)
    # In the order of `adjacency`: (i, j), (j, i), the diagonal, whose ones keep every row sum positive.
    entry = torch.cat([probabilities, probabilities, probabilities.new_ones(nodes)])
    scale = entry.new_zeros(nodes).index_add(0, graph.row, entry).rsqrt()
    return Sparse(graph, scale.index_select(0, graph.row) * entry * scale.index_select(0, graph.column))


def nearest(features: Tensor, k: int) -> Tensor:
    """Edges from each node to the k others with the highest cosine of their features, int64, (m, 2).

    Nodes that share no feature have no edge.
    """
    unit = features / features.norm(dim=1, keepdim=True).clamp_min(1e-12)
    row, column = unit.nonzero(as_tuple=True)
    similarity = Sparse(pattern(row, column, *unit.shape), unit[row, column]).times(unit.T)
    # No node is its own neighbour: entries of 0 are dropped below.
    similarity.fill_diagonal_(0)
    value, neighbour = similarity.topk(min(k, len(features) - 1), dim=1)
    node = torch.arange(len(features))[:, None].expand_as(neighbour)
    return undirected(torch.stack([node[value > 0], neighbour[value > 0]], 1), len(features))


def undirected(edges: Tensor, nodes: int) -> Tensor:
    """Each edge once, with its lower node first, sorted; int64, (m, 2)."""
    code = torch.unique(edges.min(1).values * nodes + edges.max(1).values)
    return torch.stack([code // nodes, code % nodes], 1)
