"""A perceptron on digits: two weight decays, the learning rate, the depth and the activation."""

import torch
from ray import tune
from sample_data import digits, shuffled_batches
from search_algorithms import command_line, search_algorithm
from torch import nn
from torch.nn.functional import cross_entropy

SPACE = {
    "weight_decay": {"hidden": tune.loguniform(1e-6, 1e0), "last": tune.loguniform(1e-6, 1e0)},
    "lr": tune.loguniform(1e-3, 1e0),
    "depth": tune.randint(1, 5),
    "activation": tune.choice(["ReLU", "SiLU", "Tanh"]),
    "epochs": 40,
}
WIDTH = 32


def load_data():
    return digits(train=200, val=300)


def build_model(config, inputs=64):
    torch.manual_seed(config.get("seed", 0))
    layers = [nn.Flatten()]
    for _ in range(config["depth"]):
        layers += [nn.Linear(inputs, WIDTH), getattr(nn, config["activation"])()]
        inputs = WIDTH
    return nn.Sequential(*layers, nn.Linear(inputs, 10))


def parameter_groups(model, config):
    """SGD adds the decay to the gradient, so it is part of the loss."""
    *hidden, last = (layer for layer in model if isinstance(layer, nn.Linear))
    layers = {"hidden": hidden, "last": [last]}
    return [
        {"params": [p for layer in layers[name] for p in layer.parameters()], "weight_decay": decay}
        for name, decay in config["weight_decay"].items()
    ]


def training_loss(model, config, batch):
    x, y = batch
    return cross_entropy(model(x), y)


def evaluate(model, data):
    model.eval()
    metrics = {}
    for name in ("val", "test"):
        x, y = data[name]
        with torch.no_grad():
            logits = model(x)
        metrics[f"{name}_loss"] = cross_entropy(logits, y).item()
        metrics[f"{name}_accuracy"] = (logits.argmax(1) == y).float().mean().item()
    return metrics


def fit(config):
    data = load_data()
    model = build_model(config)
    optimizer = torch.optim.SGD(parameter_groups(model, config), lr=config["lr"], momentum=0.9)
    for epoch in range(1, config["epochs"] + 1):
        model.train()
        for batch in shuffled_batches(*data["train"], 50, torch.Generator().manual_seed(epoch)):
            optimizer.zero_grad()
            training_loss(model, config, batch).backward()
            optimizer.step()
    tune.report(evaluate(model, data))
    return model


def trainable(config):
    fit(config)


def main(searcher="random", num_samples=20, seed=0, trainable=trainable):
    return tune.Tuner(
        trainable,
        param_space=SPACE,
        tune_config=tune.TuneConfig(
            metric="val_loss",
            mode="min",
            search_alg=search_algorithm(searcher, seed),
            num_samples=num_samples,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(verbose=1),
    ).fit()


if __name__ == "__main__":
    command_line(main)
