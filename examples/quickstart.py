"""A problem in one's own words, searched with Ray Tune: one weight decay per layer. Runs in a minute on two cores."""

import torch
from ray import tune
from sklearn.datasets import load_breast_cancer
from sklearn.preprocessing import scale
from torch import nn
from torch.nn.functional import cross_entropy

from raybilevel import BilevelProblem, BilevelSearch, lower_level_trainable


class Tumours(BilevelProblem):
    """A small network on 60 training patients; 140 for validation, the rest for the test."""

    epochs = 40

    def __init__(self):
        x, y = load_breast_cancer(return_X_y=True)
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
        x, y = torch.tensor(scale(x), dtype=torch.float32)[order], torch.tensor(y)[order]
        self.data = {"lower": (x[:60], y[:60]), "upper": (x[60:200], y[60:200]), "test": (x[200:], y[200:])}

    def model(self):
        return nn.Sequential(nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, 2))

    def lower_loss(self, model, hyperparameters, batch):
        x, y = batch
        decay = hyperparameters["weight_decay"]
        penalty = decay["first"] * model[0].weight.square().sum() + decay["last"] * model[2].weight.square().sum()
        return cross_entropy(model(x), y) + penalty

    def upper_loss(self, model, batch):
        x, y = batch
        return cross_entropy(model(x), y)

    def batches(self, level, generator):
        x, y = self.data[level]
        order = torch.arange(len(y)) if generator is None else torch.randperm(len(y), generator=generator)
        for rows in order.split(20):
            yield x[rows], y[rows]

    def evaluate(self, model):
        x, y = self.data["test"]
        return {"test_loss": cross_entropy(model(x), y).item()}


if __name__ == "__main__":
    problem = Tumours()
    results = tune.Tuner(
        tune.with_resources(lower_level_trainable(problem), {"cpu": 1, "gpu": 0}),
        param_space={"weight_decay": {"first": tune.loguniform(1e-5, 1e0), "last": tune.loguniform(1e-5, 1e0)}},
        tune_config=tune.TuneConfig(
            search_alg=BilevelSearch(problem), metric="upper_loss", mode="min", num_samples=15, reuse_actors=True
        ),
        run_config=tune.RunConfig(verbose=0),
    ).fit()
    best = results.get_best_result()
    print("best hyperparameters:", best.config)
    print(f"validation loss {best.metrics['upper_loss']:.4f}, test loss {best.metrics['test_loss']:.4f}")
