"""sgd_classifier.py, searched by raybilevel: alpha and the class weight have gradients."""

import torch
from ray import tune
from search_algorithms import command_line
from sgd_classifier import SPACE, evaluate, fit, load_data
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

import raybilevel
from raybilevel import BilevelProblem, BilevelSearch


class Eights(BilevelProblem):
    own_loop = True
    upper_metric = "val_loss"
    dtype = torch.double

    def __init__(self):
        self.data = {name: (torch.tensor(x), torch.tensor(y)) for name, (x, y) in load_data().items()}

    def model(self):
        return nn.Linear(64, 1)

    def losses(self, model, batch):
        """Of each example, and whether it is an 8."""
        x, y = batch
        return binary_cross_entropy_with_logits(model(x)[:, 0], y.double(), reduction="none"), y == 1

    def lower_loss(self, model, hyperparameters, batch):
        losses, eight = self.losses(model, batch)
        l1 = {"l1": 1.0, "l2": 0.0, "elasticnet": hyperparameters["l1_ratio"]}[hyperparameters["penalty"]]
        penalty = l1 * model.weight.abs().sum() + (1 - l1) / 2 * model.weight.square().sum()
        weighted = torch.where(eight, hyperparameters["positive_weight"], 1.0) * losses
        return weighted.mean() + hyperparameters["alpha"] * penalty

    def upper_loss(self, model, batch):
        losses, eight = self.losses(model, batch)
        return (losses[eight].mean() + losses[~eight].mean()) / 2

    def batches(self, level, generator):
        return [self.data["train" if level == "lower" else "val"]]


def as_module(classifier):
    module = nn.Linear(64, 1, dtype=torch.double)
    module.load_state_dict({"weight": torch.tensor(classifier.coef_), "bias": torch.tensor(classifier.intercept_)})
    return module


def trainable(config):
    classifier = fit(config)
    raybilevel.conclude(
        Eights(), as_module(classifier), config, passes=config["epochs"], metrics=evaluate(classifier, load_data())
    )


def main(num_samples=20, seed=0):
    return tune.Tuner(
        trainable,
        param_space=SPACE,
        tune_config=tune.TuneConfig(
            metric="val_loss",
            mode="min",
            search_alg=BilevelSearch(Eights(), seed=seed),
            num_samples=num_samples,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(verbose=1),
    ).fit()


if __name__ == "__main__":
    command_line(main)
