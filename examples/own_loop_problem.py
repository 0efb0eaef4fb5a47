"""A problem that trains itself: its own loop, reports and checkpoints. Runs in a minute on two cores."""

import torch
from ray import tune
from sklearn.datasets import load_breast_cancer
from sklearn.preprocessing import scale
from torch import nn
from torch.nn.functional import cross_entropy

from raybilevel import BilevelProblem, BilevelSearch, lower_level_trainable
from raybilevel.problem import minibatches


class Tumours(BilevelProblem):
    """A small network, trained by Adam with warm-up and weights averaged at the end."""

    epochs = 30

    def __init__(self):
        x, y = load_breast_cancer(return_X_y=True)
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
        x, y = torch.tensor(scale(x), dtype=torch.float32)[order], torch.tensor(y)[order]
        self.data = {"lower": (x[:60], y[:60]), "upper": (x[60:200], y[60:200]), "test": (x[200:], y[200:])}

    def model(self, hyperparameters):
        width = hyperparameters["width"]
        return nn.Sequential(nn.Linear(30, width), nn.Tanh(), nn.Linear(width, 2))

    def train(self, config, report, checkpoint):
        model, generator = self.model(config), torch.Generator().manual_seed(0)
        averaged = torch.optim.swa_utils.AveragedModel(model)
        optimizer = torch.optim.Adam(model.parameters(), lr=config["lr"])
        warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=5)
        parts = {"model": model, "averaged": averaged, "optimizer": optimizer, "warm_up": warm_up}
        begin = 0
        if checkpoint is not None:
            begin = checkpoint["epoch"]
            generator.set_state(checkpoint["generator"])
            for name, part in parts.items():
                part.load_state_dict(checkpoint[name])
        for epoch in range(begin, self.epochs):
            for batch in self.batches("lower", generator):
                optimizer.zero_grad()
                self.lower_loss(model, config, batch).backward()
                optimizer.step()
            warm_up.step()
            if epoch >= 20:
                averaged.update_parameters(model)
            if epoch % 5 == 4:
                state = {name: part.state_dict() for name, part in parts.items()}
                report({}, model, {"epoch": epoch + 1, "generator": generator.get_state(), **state})
        return averaged.module

    def lower_loss(self, model, hyperparameters, batch):
        x, y = batch
        decay = hyperparameters["weight_decay"]
        penalty = decay["first"] * model[0].weight.square().sum() + decay["last"] * model[2].weight.square().sum()
        return cross_entropy(model(x), y) + penalty

    def upper_loss(self, model, batch):
        x, y = batch
        return cross_entropy(model(x), y)

    def batches(self, level, generator):
        return minibatches(self.data[level], 20, generator)

    def evaluate(self, model):
        x, y = self.data["test"]
        return {"test_loss": cross_entropy(model(x), y).item()}


if __name__ == "__main__":
    problem = Tumours()
    results = tune.Tuner(
        tune.with_resources(lower_level_trainable(problem), {"cpu": 1}),
        param_space={
            "lr": tune.loguniform(1e-3, 1e-1),
            "width": 40,
            "weight_decay": {"first": tune.loguniform(1e-5, 1e0), "last": tune.loguniform(1e-5, 1e0)},
        },
        tune_config=tune.TuneConfig(
            search_alg=BilevelSearch(problem), metric="upper_loss", mode="min", num_samples=12, reuse_actors=True
        ),
        run_config=tune.RunConfig(verbose=0, failure_config=tune.FailureConfig(max_failures=2)),
    ).fit()
    best = results.get_best_result()
    print("best hyperparameters:", best.config)
    print(f"validation loss {best.metrics['upper_loss']:.4f}, test loss {best.metrics['test_loss']:.4f}")
