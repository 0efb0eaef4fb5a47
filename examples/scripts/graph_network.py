"""A graph convolutional or attention network that labels nodes, full batch, in the style of PyTorch Geometric."""

import copy
from itertools import pairwise

import torch
import torch.nn.functional as F  # noqa: N812
from ray import tune
from sample_data import communities, cora
from search_algorithms import command_line, search_algorithm
from torch import nn

SPACE = {
    "layer": tune.choice(["gcn", "gat"]),
    "depth": tune.randint(1, 4),
    "hidden": tune.choice([8, 16, 32]),
    "dropout": tune.uniform(0.0, 0.8),
    "edge_dropout": tune.uniform(0.0, 0.5),
    "lr": tune.loguniform(1e-3, 1e-1),
    "weight_decay": {"first": tune.loguniform(1e-5, 1e-1), "others": tune.loguniform(1e-5, 1e-1)},
    "label_smoothing": tune.uniform(0.0, 0.3),
    "epochs": 100,
}
PATIENCE = 20  # epochs


def load_data(data=None):
    return cora(data) if data else communities()


class Convolution(nn.Module):
    """Kipf & Welling (2017): the mean over neighbours, weighted by degrees."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)

    def forward(self, x, adjacency):
        scale = adjacency.sum(1).rsqrt()
        return scale[:, None] * (adjacency @ (scale[:, None] * self.linear(x)))


class Attention(nn.Module):
    """Veličković et al. (2018), one head: the mean over neighbours, weighted by attention."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        self.source, self.target = nn.Linear(outputs, 1, bias=False), nn.Linear(outputs, 1, bias=False)

    def forward(self, x, adjacency):
        h = self.linear(x)
        scores = F.leaky_relu(self.target(h) + self.source(h).T, 0.2)
        return scores.masked_fill(adjacency == 0, -torch.inf).softmax(1) @ h


class Network(nn.Module):
    def __init__(self, config, features, classes):
        super().__init__()
        self.dropout, self.edge_dropout = config["dropout"], config["edge_dropout"]
        layer = {"gcn": Convolution, "gat": Attention}[config["layer"]]
        sizes = [features, *[config["hidden"]] * (config["depth"] - 1), classes]
        self.layers = nn.ModuleList(layer(*pair) for pair in pairwise(sizes))

    def forward(self, x, edges):
        if self.training:
            edges = edges[:, torch.rand(edges.shape[1]) >= self.edge_dropout]
        adjacency = torch.eye(len(x)).index_put(tuple(edges), torch.tensor(1.0))
        for index, layer in enumerate(self.layers):
            x = layer(F.dropout(x if index == 0 else F.elu(x), self.dropout, self.training), adjacency)
        return x


def build_model(config, data):
    torch.manual_seed(config.get("seed", 0))
    return Network(config, data["x"].shape[1], int(data["y"].max()) + 1)


def parameter_groups(model, config):
    first, others = model.layers[0].parameters(), model.layers[1:].parameters()
    decays = config["weight_decay"]
    return [
        {"params": list(first), "weight_decay": decays["first"]},
        {"params": list(others), "weight_decay": decays["others"]},
    ]


def training_loss(model, config, data):
    logits = model(data["x"], data["edges"])[data["train"]]
    return F.cross_entropy(logits, data["y"][data["train"]], label_smoothing=config["label_smoothing"])


def evaluate(model, data):
    model.eval()
    with torch.no_grad():
        logits = model(data["x"], data["edges"])
    metrics = {}
    for name in ("val", "test"):
        y = data["y"][data[name]]
        metrics[f"{name}_loss"] = F.cross_entropy(logits[data[name]], y).item()
        metrics[f"{name}_accuracy"] = (logits[data[name]].argmax(1) == y).float().mean().item()
    return metrics


def fit(config):
    """The trained model, and how many epochs it took."""
    data = load_data(config.get("data"))
    model = build_model(config, data)
    optimizer = torch.optim.Adam(parameter_groups(model, config), lr=config["lr"])
    best, best_epoch, best_weights = {"val_loss": torch.inf}, 0, None
    for epoch in range(1, config["epochs"] + 1):
        model.train()
        optimizer.zero_grad()
        training_loss(model, config, data).backward()
        optimizer.step()
        metrics = evaluate(model, data)
        if metrics["val_loss"] < best["val_loss"]:
            best, best_epoch, best_weights = metrics, epoch, copy.deepcopy(model.state_dict())
        if epoch - best_epoch == PATIENCE:
            break
    tune.report({**best, "epochs": epoch})
    model.load_state_dict(best_weights)
    return model, epoch


def trainable(config):
    fit(config)


def main(searcher="random", num_samples=20, seed=0, data=None, trainable=trainable):
    return tune.Tuner(
        trainable,
        param_space={**SPACE, "data": data},
        tune_config=tune.TuneConfig(
            metric="val_loss",
            mode="min",
            search_alg=search_algorithm(searcher, seed),
            num_samples=num_samples,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(verbose=1),
    ).fit()


if __name__ == "__main__":
    command_line(main)
