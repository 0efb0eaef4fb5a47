"""Your own training loop in an ordinary Tune function, with one call at its end. Runs in a minute on two cores.

The learning rate and the width are searched by values, the weight decay and the label smoothing, which stand in the
loss, with gradients.
"""

import copy

import torch
from ray import tune
from sklearn.datasets import load_breast_cancer
from sklearn.preprocessing import scale
from torch import nn

import raybilevel
from raybilevel import BilevelProblem, BilevelSearch
from raybilevel.functional import cross_entropy

x, y = load_breast_cancer(return_X_y=True)
order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
x, y = torch.tensor(scale(x), dtype=torch.float32)[order], torch.tensor(y)[order]
DATA = {"train": (x[:60], y[:60]), "validation": (x[60:200], y[60:200]), "test": (x[200:], y[200:])}


def make_model(config):
    return nn.Sequential(nn.Linear(30, config["width"]), nn.Tanh(), nn.Linear(config["width"], 2))


def training_loss(model, config, batch):
    x, y = batch
    decay = config["weight_decay"] * sum(weight.square().sum() for weight in model.parameters())
    return cross_entropy(model(x), y, label_smoothing=config["label_smoothing"]) + decay


def validation_loss(model, part="validation"):
    x, y = DATA[part]
    return cross_entropy(model(x), y)


class Tumours(BilevelProblem):
    """What the search needs to know of the script: the model, and both losses on their data."""

    own_loop = True
    epochs = 30

    def model(self, hyperparameters):
        return make_model(hyperparameters)

    def lower_loss(self, model, hyperparameters, batch):
        return training_loss(model, hyperparameters, batch)

    def upper_loss(self, model, batch):
        return validation_loss(model)

    def batches(self, level, generator):
        return [DATA["train" if level == "lower" else "validation"]]

    def evaluate(self, model):
        return {"test_loss": validation_loss(model, "test").item()}


def trainable(config):
    torch.manual_seed(0)
    model = make_model(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config["lr"], weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config["lr"], total_steps=90)
    best = (float("inf"), None)
    for _ in range(30):
        x, y = DATA["train"]
        for rows in torch.randperm(60).split(20):
            optimizer.zero_grad()
            training_loss(model, config, (x[rows], y[rows])).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            loss = validation_loss(model).item()
        if loss < best[0]:
            best = (loss, copy.deepcopy(model))
        tune.report({"upper_loss": loss})
    raybilevel.conclude(Tumours(), best[1], config)


if __name__ == "__main__":
    results = tune.Tuner(
        tune.with_resources(trainable, {"cpu": 1}),
        param_space={
            "lr": tune.loguniform(1e-3, 1e-1),
            "width": tune.randint(5, 60),
            "weight_decay": tune.loguniform(1e-5, 1e-1),
            "label_smoothing": tune.uniform(0.0, 0.3),
        },
        tune_config=tune.TuneConfig(
            search_alg=BilevelSearch(Tumours()), metric="upper_loss", mode="min", num_samples=12, reuse_actors=True
        ),
        run_config=tune.RunConfig(verbose=0),
    ).fit()
    best = results.get_best_result()
    print("best hyperparameters:", best.config)
    print(f"validation loss {best.metrics['upper_loss']:.4f}, test loss {best.metrics['test_loss']:.4f}")
