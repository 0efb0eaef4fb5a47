"""PyTorch's MNIST example: two convolutions, two dropouts, Adadelta, a learning rate that falls in steps."""

import torch
import torch.nn.functional as F  # noqa: N812
from ray import tune
from sample_data import digits, mnist, shuffled_batches
from search_algorithms import command_line, search_algorithm
from torch import nn
from torch.optim.lr_scheduler import StepLR

SPACE = {
    "lr": tune.loguniform(0.1, 3.0),
    "rho": tune.uniform(0.7, 0.99),
    "gamma": tune.uniform(0.5, 1.0),
    "step_size": tune.randint(1, 7),
    "epochs": tune.randint(8, 31),
    "batch_size": tune.choice([16, 32, 64]),
    "dropout1": tune.uniform(0.0, 0.7),
    "dropout2": tune.uniform(0.0, 0.7),
    "weight_decay": {"conv": tune.loguniform(1e-6, 1e-1), "fc": tune.loguniform(1e-6, 1e-1)},
}


def load_data(data=None):
    return mnist(data) if data else digits(train=300, val=500)


class Net(nn.Module):
    def __init__(self, config, size):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, 1, padding=1)
        self.conv2 = nn.Conv2d(8, 16, 3, 1)
        self.dropout1 = nn.Dropout(config["dropout1"])
        self.dropout2 = nn.Dropout(config["dropout2"])
        self.fc1 = nn.Linear(16 * ((size - 2) // 2) ** 2, 64)
        self.fc2 = nn.Linear(64, 10)

    def forward(self, x):
        x = F.relu(self.conv1(x))
        x = F.relu(self.conv2(x))
        x = self.dropout1(F.max_pool2d(x, 2))
        x = F.relu(self.fc1(torch.flatten(x, 1)))
        return F.log_softmax(self.fc2(self.dropout2(x)), dim=1)


def build_model(config, x):
    torch.manual_seed(config.get("seed", 0))
    return Net(config, size=x.shape[-1])


def parameter_groups(model, config):
    """Adadelta adds the decay to the gradient, so it is part of the loss."""
    layers = {"conv": (model.conv1, model.conv2), "fc": (model.fc1, model.fc2)}
    return [
        {"params": [p for layer in layers[name] for p in layer.parameters()], "weight_decay": decay}
        for name, decay in config["weight_decay"].items()
    ]


def training_loss(model, config, batch):
    x, y = batch
    return F.nll_loss(model(x), y)


def train(model, config, data, optimizer, epoch):
    model.train()
    for batch in shuffled_batches(*data["train"], config["batch_size"], torch.Generator().manual_seed(epoch)):
        optimizer.zero_grad()
        training_loss(model, config, batch).backward()
        optimizer.step()


def test(model, data):
    model.eval()
    metrics = {}
    for name in ("val", "test"):
        x, y = data[name]
        with torch.no_grad():
            logits = model(x)
        metrics[f"{name}_loss"] = F.nll_loss(logits, y).item()
        metrics[f"{name}_accuracy"] = (logits.argmax(1) == y).float().mean().item()
    return metrics


def fit(config):
    data = load_data(config.get("data"))
    model = build_model(config, data["train"][0])
    optimizer = torch.optim.Adadelta(parameter_groups(model, config), lr=config["lr"], rho=config["rho"])
    scheduler = StepLR(optimizer, step_size=config["step_size"], gamma=config["gamma"])
    for epoch in range(1, config["epochs"] + 1):
        train(model, config, data, optimizer, epoch)
        scheduler.step()
        tune.report(test(model, data))
    return model


def trainable(config):
    fit(config)


def main(searcher="random", num_samples=20, seed=0, data=None, trainable=trainable):
    return tune.Tuner(
        trainable,
        param_space={**SPACE, "data": data},
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
