"""timm_recipe.py, searched by raybilevel: the label smoothing has gradients."""

from ray import tune
from search_algorithms import command_line
from timm_recipe import SPACE, build_model, fit, load_data, validate

import raybilevel
from raybilevel import BilevelProblem, BilevelSearch
from raybilevel.functional import cross_entropy


class Images(BilevelProblem):
    own_loop = True
    upper_metric = "val_loss"

    def __init__(self, folder=None):
        self.data = load_data(folder)

    def model(self, hyperparameters):
        return build_model(hyperparameters, self.data["train"][0])

    def lower_loss(self, model, hyperparameters, batch):
        x, y = batch
        return cross_entropy(model(x), y, label_smoothing=hyperparameters["smoothing"])

    def upper_loss(self, model, batch):
        x, y = batch
        return cross_entropy(model(x), y)

    def batches(self, level, generator):
        return [self.data["train" if level == "lower" else "val"]]

    def evaluate(self, model):
        return validate(model, self.data)


def trainable(config):
    model = fit(config)
    raybilevel.conclude(Images(config["data"]), model, config, passes=config["epochs"])


def main(num_samples=20, seed=0, data=None):
    return tune.Tuner(
        trainable,
        param_space={**SPACE, "data": data},
        tune_config=tune.TuneConfig(
            metric="val_loss",
            mode="min",
            search_alg=BilevelSearch(Images(data), seed=seed),
            num_samples=num_samples,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(verbose=1),
    ).fit()


if __name__ == "__main__":
    command_line(main)
