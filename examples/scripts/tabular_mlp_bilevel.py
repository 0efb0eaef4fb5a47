"""tabular_mlp.py, searched by raybilevel: Huber's delta and the weight decay have gradients."""

from ray import tune
from search_algorithms import command_line
from tabular_mlp import SPACE, build_model, evaluate, fit, load_data
from torch.nn.functional import l1_loss

import raybilevel
from raybilevel import BilevelProblem, BilevelSearch
from raybilevel.functional import huber_loss, weight_decay


class Houses(BilevelProblem):
    own_loop = True
    upper_metric = "val_loss"

    def __init__(self):
        self.data = load_data()

    def model(self, hyperparameters):
        return build_model(hyperparameters)

    def lower_loss(self, model, hyperparameters, batch):
        x, y = batch
        decay = weight_decay(model.parameters(), hyperparameters["weight_decay"])
        return huber_loss(model(x), y, delta=hyperparameters["huber_delta"]) + decay

    def upper_loss(self, model, batch):
        x, y = batch
        return l1_loss(model(x), y)

    def batches(self, level, generator):
        return [self.data["train" if level == "lower" else "val"]]

    def evaluate(self, model):
        return {"test_loss": evaluate(model, *self.data["test"])}


def trainable(config):
    model, epochs = fit(config)
    raybilevel.conclude(Houses(), model, config, passes=epochs)


def main(num_samples=20, seed=0):
    return tune.Tuner(
        trainable,
        param_space=SPACE,
        tune_config=tune.TuneConfig(
            metric="val_loss",
            mode="min",
            search_alg=BilevelSearch(Houses(), seed=seed),
            num_samples=num_samples,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(verbose=1),
    ).fit()


if __name__ == "__main__":
    command_line(main)
