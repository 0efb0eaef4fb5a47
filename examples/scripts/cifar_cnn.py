"""A small convolutional network, after Ray's CIFAR tutorial: checkpoints, a loop over epochs, a report after each."""

import tempfile
from pathlib import Path

import torch
from ray import tune
from sample_data import cifar10, digits, shuffled_batches
from search_algorithms import command_line, search_algorithm
from torch import nn
from torch.nn.functional import cross_entropy, pad

SPACE = {
    "channels": tune.choice([4, 8, 16]),
    "l1": tune.choice([16, 32, 64, 128]),
    "l2": tune.choice([16, 32, 64, 128]),
    "lr": tune.loguniform(1e-2, 3e-1),
    "momentum": tune.uniform(0.6, 0.95),
    "batch_size": tune.choice([16, 32, 64]),
    "weight_decay": tune.loguniform(1e-6, 3e-2),
    "label_smoothing": tune.uniform(0.0, 0.3),
    "dropout": tune.uniform(0.0, 0.5),
    "epochs": 30,
}


def load_data(data=None):
    return cifar10(data) if data else digits()


class Net(nn.Module):
    def __init__(self, config, colours, size):
        super().__init__()
        channels = config["channels"]
        self.features = nn.Sequential(
            nn.Conv2d(colours, channels, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(channels, 2 * channels, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        )  # fmt: skip
        self.classifier = nn.Sequential(
            nn.Dropout(config["dropout"]), nn.Linear(2 * channels * (size // 4) ** 2, config["l1"]), nn.ReLU(),
            nn.Dropout(config["dropout"]), nn.Linear(config["l1"], config["l2"]), nn.ReLU(),
            nn.Linear(config["l2"], 10),
        )  # fmt: skip

    def forward(self, x):
        return self.classifier(self.features(x))


def build_model(config, x):
    torch.manual_seed(config.get("seed", 0))
    return Net(config, colours=x.shape[1], size=x.shape[2])


def training_loss(model, config, batch):
    x, y = batch
    return cross_entropy(model(x), y, label_smoothing=config["label_smoothing"])


def augmented(x, generator):
    """Images shifted by up to one pixel in each direction."""
    across, down = torch.randint(-1, 2, (2,), generator=generator).tolist()
    return pad(x, (1, 1, 1, 1)).roll((across, down), (2, 3))[:, :, 1:-1, 1:-1]


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
    data = load_data(config.get("data"))
    model = build_model(config, data["train"][0])
    optimizer = torch.optim.SGD(
        model.parameters(), lr=config["lr"], momentum=config["momentum"], weight_decay=config["weight_decay"]
    )
    start = 0
    if checkpoint := tune.get_checkpoint():
        with checkpoint.as_directory() as folder:
            state = torch.load(Path(folder) / "state.pt")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["epoch"]
    for epoch in range(start + 1, config["epochs"] + 1):
        model.train()
        generator = torch.Generator().manual_seed(epoch)
        for x, y in shuffled_batches(*data["train"], config["batch_size"], generator):
            optimizer.zero_grad()
            training_loss(model, config, (augmented(x, generator), y)).backward()
            optimizer.step()
        with tempfile.TemporaryDirectory() as folder:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch}
            torch.save(state, Path(folder) / "state.pt")
            tune.report(evaluate(model, data), checkpoint=tune.Checkpoint.from_directory(folder))
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
