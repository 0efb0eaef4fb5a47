"""The hooks of raybilevel's training loop: schedule, clipping, accumulation, averaged weights, early stopping.

Runs in half a minute, without Ray.
"""

import torch
from sklearn.datasets import load_breast_cancer
from sklearn.preprocessing import scale
from torch import nn
from torch.nn.functional import cross_entropy

from raybilevel import BilevelProblem
from raybilevel.methods import make_method
from raybilevel.problem import minibatches
from raybilevel.search import BilevelOptimizer, search
from raybilevel.space import Parameter, Space


class Tumours(BilevelProblem):
    """A small network; learning rate and batch size come from the config."""

    epochs = 60
    clip = 1.0
    accumulate = 2
    ema = 0.9
    patience = 10

    def __init__(self):
        x, y = load_breast_cancer(return_X_y=True)
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
        x, y = torch.tensor(scale(x), dtype=torch.float32)[order], torch.tensor(y)[order]
        self.data = {"lower": (x[:60], y[:60]), "upper": (x[60:200], y[60:200]), "test": (x[200:], y[200:])}

    def model(self):
        return nn.Sequential(nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, 2))

    def optimizer(self, model, hyperparameters):
        return torch.optim.AdamW(model.parameters(), lr=hyperparameters["lr"], weight_decay=0)

    def schedule(self, optimizer):
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs)

    def batches(self, level, generator, hyperparameters):
        return minibatches(self.data[level], hyperparameters["batch_size"], generator)

    def lower_loss(self, model, hyperparameters, batch):
        x, y = batch
        decay = sum(parameter.square().sum() for parameter in model.parameters())
        return cross_entropy(model(x), y) + hyperparameters["weight_decay"] * decay

    def upper_loss(self, model, batch):
        x, y = batch
        return cross_entropy(model(x), y)

    def evaluate(self, model):
        x, y = self.data["test"]
        return {"test_loss": cross_entropy(model(x), y).item()}


if __name__ == "__main__":
    space = Space((Parameter(("weight_decay",), 1e-5, 1e-1, log=True),))
    optimizer = BilevelOptimizer(space, make_method("default"))
    search(Tumours(), optimizer, cost=10, constants={"lr": 0.01, "batch_size": 10})
    best = optimizer.state.best
    print("best hyperparameters:", space.to_config(torch.tensor(best.unit)))
    print(f"validation loss {best.upper_loss:.4f} after {len(optimizer.state.done)} training runs")
