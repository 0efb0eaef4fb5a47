"""hf_bert.py, searched by raybilevel: the label smoothing has gradients."""

from hf_bert import SPACE, build_model, fit, load_data
from ray import tune
from search_algorithms import command_line
from transformers import default_data_collator

import raybilevel
from raybilevel import BilevelProblem, BilevelSearch
from raybilevel.functional import cross_entropy


class Sentences(BilevelProblem):
    own_loop = True
    upper_metric = "val_loss"

    def __init__(self):
        self.data = {name: dict(default_data_collator(rows)) for name, rows in load_data().items()}

    def model(self, hyperparameters):
        return build_model(hyperparameters)

    def logits(self, model, batch):
        return model(batch["input_ids"], batch["attention_mask"]).logits

    def lower_loss(self, model, hyperparameters, batch):
        smoothing = hyperparameters["label_smoothing_factor"]
        return cross_entropy(self.logits(model, batch), batch["labels"], label_smoothing=smoothing)

    def upper_loss(self, model, batch):
        return cross_entropy(self.logits(model, batch), batch["labels"])

    def batches(self, level, generator):
        return [self.data["train" if level == "lower" else "val"]]

    def evaluate(self, model):
        logits, y = self.logits(model, self.data["test"]), self.data["test"]["labels"]
        return {"test_loss": cross_entropy(logits, y), "test_accuracy": (logits.argmax(1) == y).float().mean()}


def trainable(config):
    model = fit(config)
    raybilevel.conclude(Sentences(), model, config, passes=config["num_train_epochs"])


def main(num_samples=20, seed=0):
    return tune.Tuner(
        trainable,
        param_space=SPACE,
        tune_config=tune.TuneConfig(
            metric="val_loss",
            mode="min",
            search_alg=BilevelSearch(Sentences(), seed=seed),
            num_samples=num_samples,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(verbose=1),
    ).fit()


if __name__ == "__main__":
    command_line(main)
