"""A tabular regression by an MLP with mixup, an exponential moving average of the weights and early stopping."""

import copy

import torch
from ray import tune
from sample_data import shuffled_batches, split
from search_algorithms import command_line, search_algorithm
from torch import nn
from torch.nn.functional import huber_loss, l1_loss
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

SPACE = {
    "depth": tune.randint(1, 5),
    "width": tune.choice([32, 64, 128]),
    "activation": tune.choice(["ReLU", "SiLU", "Tanh"]),
    "dropout": tune.uniform(0.0, 0.5),
    "lr": tune.loguniform(1e-3, 3e-2),
    "weight_decay": tune.loguniform(1e-6, 1e-1),
    "huber_delta": tune.loguniform(0.03, 3.0),
    "mixup_alpha": tune.loguniform(0.01, 2.0),
    "ema_decay": tune.uniform(0.8, 0.995),
    "batch_size": tune.choice([32, 64, 128]),
    "epochs": 60,
}
PATIENCE = 10  # epochs


def load_data(rows=3000, features=8):
    """Prices of houses that never were: eight features, of which five matter; a tenth of the prices are wildly wrong.

    The training data alone have the wrong prices.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(rows, features, generator=generator) * 2 - 1
    income, age, rooms, north, west = x.T[:5]
    coast = (-4 * ((north - 0.3) ** 2 + (west + 0.5 * north) ** 2)).exp()
    price = income + 0.5 * income * rooms + 1.5 * coast + 0.3 * torch.sin(3 * age)
    data = split(x, price + 0.2 * torch.randn(rows, generator=generator), train=800, val=700)
    x, y = data["train"]
    wrong = torch.rand(len(y), generator=generator) < 0.1
    data["train"] = x, torch.where(wrong, y + 4 * torch.randn(len(y), generator=generator).abs(), y)
    return data


def build_model(config, features=8):
    torch.manual_seed(config.get("seed", 0))
    layers, inputs = [], features
    for _ in range(config["depth"]):
        activation = getattr(nn, config["activation"])()
        layers += [nn.Linear(inputs, config["width"]), activation, nn.Dropout(config["dropout"])]
        inputs = config["width"]
    return nn.Sequential(*layers, nn.Linear(inputs, 1), nn.Flatten(0))


def mixed(batch, alpha):
    """Mixup (Zhang et al., 2018): each example becomes a mean of two, in a random proportion."""
    x, y = batch
    share = torch.distributions.Beta(alpha, alpha).sample()
    others = torch.randperm(len(x))
    return torch.lerp(x[others], x, share), torch.lerp(y[others], y, share)


def training_loss(model, config, batch):
    x, y = mixed(batch, config["mixup_alpha"])
    return huber_loss(model(x), y, delta=config["huber_delta"])


def evaluate(model, x, y):
    """The mean absolute error."""
    model.eval()
    with torch.no_grad():
        return l1_loss(model(x), y).item()


def fit(config):
    """The trained model, and how many epochs it took."""
    data = load_data()
    model = build_model(config)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config["ema_decay"]))
    # Huber's gradient grows with delta; Adam's steps do not.
    optimizer = torch.optim.Adam(model.parameters(), lr=config["lr"], weight_decay=config["weight_decay"])
    best_loss, best_epoch, best_weights = torch.inf, 0, None
    for epoch in range(1, config["epochs"] + 1):
        model.train()
        for batch in shuffled_batches(*data["train"], config["batch_size"], torch.Generator().manual_seed(epoch)):
            optimizer.zero_grad()
            training_loss(model, config, batch).backward()
            optimizer.step()
            average.update_parameters(model)
        val_loss = evaluate(average, *data["val"])
        if val_loss < best_loss:
            best_loss, best_epoch, best_weights = val_loss, epoch, copy.deepcopy(average.state_dict())
        if epoch - best_epoch == PATIENCE:
            break
    average.load_state_dict(best_weights)
    tune.report({"val_loss": best_loss, "test_loss": evaluate(average, *data["test"]), "epochs": epoch})
    return average.module, epoch


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
