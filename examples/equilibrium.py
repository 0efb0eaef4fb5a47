"""A lower level that is a fixed point and not a minimum: the hidden states of a small recurrent network, at rest.

Each row z of the states is where z = tanh(W z + U image + b) comes to rest; the upper level is W, U, b and the
classifier that reads z. One descent, in this process and without Ray; `hypergradient_trainable` makes trials of it.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from raybilevel import LargeUpperLevel
from raybilevel.hypergradient import BilevelDescent
from raybilevel.methods import HypergradientDescent


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.recurrent, self.inputs, self.readout = nn.Linear(32, 32), nn.Linear(64, 32), nn.Linear(32, 10)

    def forward(self, states, images):
        norm = torch.linalg.matrix_norm(self.recurrent.weight, 2)
        weight = self.recurrent.weight * (0.9 / norm).clamp(max=1)  # a contraction: there is one place to rest
        return torch.tanh(states @ weight.T + self.inputs(images))


class States(nn.Module):
    def __init__(self, examples):
        super().__init__()
        self.states = nn.Parameter(torch.zeros(examples, 32))


class Digits(LargeUpperLevel):
    def __init__(self):
        images, labels = load_digits(return_X_y=True)
        self.data = torch.tensor(images[:500] / 16, dtype=torch.float32), torch.tensor(labels[:500])

    def model(self):  # y: a row of states for each image
        return States(500)

    def upper_variables(self):  # x
        return Network()

    def lower_map(self, model, hyperparameters, batch):  # g of y = g(x, y)
        return hyperparameters["upper"](model.states, batch[0])

    def lower_loss(self, model, hyperparameters, batch):  # what is reported of the lower level: 0 at rest
        return (self.lower_map(model, hyperparameters, batch) - model.states).square().sum()

    def upper_loss(self, model, hyperparameters, batch):  # F, which depends on x itself
        return cross_entropy(hyperparameters["upper"].readout(model.states), batch[1])

    def batches(self, level, generator):
        yield self.data


if __name__ == "__main__":
    method = HypergradientDescent(
        steps=40, rate=0.02, lower="fixed_point", lower_tolerance=1e-3, estimator="equilibrium"
    )
    descent = BilevelDescent(Digits(), {"start": 0}, method)
    while not descent.finished:
        descent.run_step()
    found = descent.conclude()
    print(f"best F {found['upper_loss']:.4f}; |g(z) - z|^2 summed over all states {found['lower_loss']:.1e}")
