"""char_gpt.py, searched by raybilevel: the label smoothing has gradients."""

import torch
from char_gpt import CONTEXT, SPACE, build_model, evaluate, fit, load_data, windows
from ray import tune
from search_algorithms import command_line

import raybilevel
from raybilevel import BilevelProblem, BilevelSearch
from raybilevel.functional import cross_entropy


class Characters(BilevelProblem):
    own_loop = True
    upper_metric = "val_loss"

    def __init__(self):
        self.codes, self.vocabulary = load_data()

    def model(self, hyperparameters):
        return build_model(hyperparameters, self.vocabulary)

    def lower_loss(self, model, hyperparameters, batch):
        return self.loss(model, batch, hyperparameters["label_smoothing"])

    def upper_loss(self, model, batch):
        return self.loss(model, batch)

    def loss(self, model, batch, label_smoothing=0.0):
        x, y = batch
        return cross_entropy(model(x).flatten(0, 1), y.flatten(), label_smoothing=label_smoothing)

    def batches(self, level, generator):
        codes = self.codes["train" if level == "lower" else "val"]
        return [windows(codes, torch.arange(0, len(codes) - CONTEXT, CONTEXT // 4))]

    def evaluate(self, model):
        return {"test_loss": evaluate(model, self.codes["test"])}


def trainable(config):
    problem = Characters()
    ((x, _),) = problem.batches("lower", None)
    raybilevel.conclude(problem, fit(config), config, passes=16 * config["steps"] / len(x))


def main(num_samples=20, seed=0):
    return tune.Tuner(
        trainable,
        param_space=SPACE,
        tune_config=tune.TuneConfig(
            metric="val_loss",
            mode="min",
            search_alg=BilevelSearch(Characters(), seed=seed),
            num_samples=num_samples,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(verbose=1),
    ).fit()


if __name__ == "__main__":
    command_line(main)
