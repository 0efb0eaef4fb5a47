"""graph_network.py, searched by raybilevel: the weight decays and the label smoothing have gradients."""

from graph_network import SPACE, build_model, evaluate, fit, load_data, parameter_groups
from ray import tune
from search_algorithms import command_line

import raybilevel
from raybilevel import BilevelProblem, BilevelSearch
from raybilevel.functional import cross_entropy, weight_decay


class Nodes(BilevelProblem):
    own_loop = True
    upper_metric = "val_loss"

    def __init__(self, folder=None):
        self.data = load_data(folder)

    def model(self, hyperparameters):
        return build_model(hyperparameters, self.data)

    def loss(self, model, nodes, label_smoothing=0.0):
        logits = model(self.data["x"], self.data["edges"])
        return cross_entropy(logits[nodes], self.data["y"][nodes], label_smoothing=label_smoothing)

    def lower_loss(self, model, hyperparameters, nodes):
        decay = weight_decay(parameter_groups(model, hyperparameters))
        return self.loss(model, nodes, hyperparameters["label_smoothing"]) + decay

    def upper_loss(self, model, nodes):
        return self.loss(model, nodes)

    def batches(self, level, generator):
        return [self.data["train" if level == "lower" else "val"]]

    def evaluate(self, model):
        return evaluate(model, self.data)


def trainable(config):
    model, epochs = fit(config)
    raybilevel.conclude(Nodes(config["data"]), model, config, passes=epochs)


def main(num_samples=20, seed=0, data=None):
    return tune.Tuner(
        trainable,
        param_space={**SPACE, "data": data},
        tune_config=tune.TuneConfig(
            metric="val_loss",
            mode="min",
            search_alg=BilevelSearch(Nodes(data), seed=seed),
            num_samples=num_samples,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(verbose=1),
    ).fit()


if __name__ == "__main__":
    command_line(main)
