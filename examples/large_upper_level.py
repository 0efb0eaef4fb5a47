"""An upper level of a few hundred variables: a weight for every training example, some of whose labels are wrong.

Each trial is a whole descent along hypergradients; what it learned lies in its checkpoint.
"""

import torch
from ray import tune
from sklearn.datasets import load_breast_cancer
from torch import nn
from torch.nn.functional import cross_entropy

from raybilevel import BilevelSearch, LargeUpperLevel, hypergradient_trainable
from raybilevel.methods import HypergradientDescent


class Weights(nn.Module):
    def __init__(self, examples):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(examples))


class Cleaning(LargeUpperLevel):
    def __init__(self):
        data, labels = load_breast_cancer(return_X_y=True)
        x, y = torch.tensor(data, dtype=torch.float32), torch.tensor(labels)
        x = (x - x.mean(0)) / x.std(0)
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(len(x), generator=generator)
        lower, upper = order[:300], order[300:]
        self.wrong = torch.rand(300, generator=generator) < 0.3
        self.lower = (x[lower], torch.where(self.wrong, 1 - y[lower], y[lower]))
        self.upper = (x[upper], y[upper])

    def model(self):
        return nn.Linear(30, 2)

    def upper_variables(self):  # x: a module; hyperparameters["upper"] in the losses
        return Weights(300)

    def lower_loss(self, model, hyperparameters, batch):
        x, y = batch
        weights = torch.sigmoid(hyperparameters["upper"].logits)
        losses = cross_entropy(model(x), y, reduction="none")
        return (weights * losses).mean() + 1e-3 * model.weight.square().sum()

    def upper_loss(self, model, batch):
        x, y = batch
        return cross_entropy(model(x), y)

    def batches(self, level, generator):
        yield self.lower if level == "lower" else self.upper

    def evaluate(self, model, hyperparameters):
        weights = torch.sigmoid(hyperparameters["upper"].logits)
        return {"weight_of_right": weights[~self.wrong].mean(), "weight_of_wrong": weights[self.wrong].mean()}


if __name__ == "__main__":
    problem = Cleaning()
    method = HypergradientDescent(steps=30, rate=0.3, lower="tolerance", lower_tolerance=1e-4)
    results = tune.Tuner(
        tune.with_resources(hypergradient_trainable(problem, method), {"cpu": 1}),
        param_space={"start": tune.quniform(0, 65535, 1)},  # the number of the start, 0, 1, 2, ...
        tune_config=tune.TuneConfig(
            search_alg=BilevelSearch(problem, method=method), metric="upper_loss", mode="min", num_samples=1
        ),
        run_config=tune.RunConfig(verbose=0),
    ).fit()
    best = results.get_best_result()
    print(f"validation loss {best.metrics['upper_loss']:.4f}")
    right, wrong = best.metrics["weight_of_right"], best.metrics["weight_of_wrong"]
    print(f"mean weight of right labels {right:.2f}, of wrong ones {wrong:.2f}; checkpoint {best.checkpoint.path}")
