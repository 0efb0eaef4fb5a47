"""Weight decay per layer of a small network, tuned with Ray Tune. Runs in a minute on two cores."""

import torch
from ray import tune
from sklearn.datasets import load_breast_cancer
from sklearn.preprocessing import scale
from torch import nn
from torch.nn.functional import cross_entropy

from raybilevel import BilevelProblem, BilevelSearch, lower_level_trainable
from raybilevel.problem import minibatches


class Tumours(BilevelProblem):
    epochs = 40

    def __init__(self):
        x, y = load_breast_cancer(return_X_y=True)
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
        x, y = torch.tensor(scale(x), dtype=torch.float32)[order], torch.tensor(y)[order]
        self.data = {"lower": (x[:60], y[:60]), "upper": (x[60:200], y[60:200]), "test": (x[200:], y[200:])}

    def batches(self, level, generator):  # "lower" is the training data, "upper" the validation data
        return minibatches(self.data[level], 20, generator)

    def model(self):
        return nn.Sequential(nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, 2))

    def lower_loss(self, model, hyperparameters, batch):  # f: the training loss, regularisers included
        decay = hyperparameters["weight_decay"]  # tensors, named and nested as in the search space
        first, last = model[0].weight.square().sum(), model[2].weight.square().sum()
        return self.upper_loss(model, batch) + decay["first"] * first + decay["last"] * last

    def upper_loss(self, model, batch):  # F: the validation loss
        x, y = batch
        return cross_entropy(model(x), y)

    def evaluate(self, model):
        x, y = self.data["test"]
        return {"test_loss": cross_entropy(model(x), y).item()}


if __name__ == "__main__":
    problem = Tumours()
    trainable = tune.with_resources(lower_level_trainable(problem), {"cpu": 1, "gpu": 0})
    space = {"weight_decay": {"first": tune.loguniform(1e-5, 1e0), "last": tune.loguniform(1e-5, 1e0)}}
    settings = tune.TuneConfig(
        search_alg=BilevelSearch(problem), metric="upper_loss", mode="min", num_samples=15, reuse_actors=True
    )
    results = tune.Tuner(trainable, param_space=space, tune_config=settings, run_config=tune.RunConfig(verbose=0)).fit()
    best = results.get_best_result()
    print("best hyperparameters:", best.config)
    print(f"validation loss {best.metrics['upper_loss']:.4f}, test loss {best.metrics['test_loss']:.4f}")
