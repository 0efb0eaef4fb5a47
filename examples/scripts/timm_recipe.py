"""A small residual network by timm's recipe: AdamW, warm-up and cosine, stochastic depth, random erasing."""

import math

import torch
from ray import tune
from sample_data import cifar10, digits, shuffled_batches
from search_algorithms import command_line, search_algorithm
from torch import nn
from torch.nn.functional import cross_entropy

SPACE = {
    "blocks": tune.randint(1, 5),
    "channels": tune.choice([8, 16, 24]),
    "lr": tune.loguniform(1e-3, 5e-2),
    "weight_decay": tune.loguniform(1e-3, 1e0),
    "beta2": tune.uniform(0.9, 0.999),
    "smoothing": tune.uniform(0.0, 0.3),
    "drop": tune.uniform(0.0, 0.5),
    "drop_path": tune.uniform(0.0, 0.4),
    "reprob": tune.uniform(0.0, 0.5),
    "warmup_epochs": tune.randint(0, 6),
    "epochs": 15,
    "batch_size": 50,
}


def load_data(data=None):
    return cifar10(data) if data else digits(train=300)


class Block(nn.Module):
    """A residual block that is left out of an example with a probability (Huang et al., 2016)."""

    def __init__(self, channels, drop_path):
        super().__init__()
        self.drop_path = drop_path
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels),
        )  # fmt: skip

    def forward(self, x):
        branch = self.body(x)
        if self.training:
            kept = torch.rand(len(x), 1, 1, 1) >= self.drop_path
            branch = branch * kept / (1 - self.drop_path)
        return (x + branch).relu()


def build_model(config, x):
    torch.manual_seed(config.get("seed", 0))
    channels, blocks = config["channels"], config["blocks"]
    # Later blocks are left out more often.
    rates = [config["drop_path"] * (index + 1) / blocks for index in range(blocks)]
    stride = max(1, x.shape[-1] // 8)
    return nn.Sequential(
        nn.Conv2d(x.shape[1], channels, 3, stride, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(),
        *(Block(channels, rate) for rate in rates),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(config["drop"]), nn.Linear(4 * channels, 10),
    )  # fmt: skip


def erased(x, probability):
    """A rectangle of each image is blotted out with this probability (Zhong et al., 2020)."""
    x = x.clone()
    size = x.shape[-1] // 3
    for index in (torch.rand(len(x)) < probability).nonzero():
        row, column = torch.randint(x.shape[-1] - size + 1, (2,)).tolist()
        x[index, :, row : row + size, column : column + size] = 0
    return x


def build_optimizer(model, config):
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": config["weight_decay"]}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config["lr"], betas=(0.9, config["beta2"]))


def schedule(epoch, config):
    """The share of the learning rate in an epoch, from 0."""
    if epoch < config["warmup_epochs"]:
        return (epoch + 1) / (config["warmup_epochs"] + 1)
    return 0.5 * (1 + math.cos(math.pi * epoch / config["epochs"]))


def training_loss(model, config, batch):
    x, y = batch
    return cross_entropy(model(x), y, label_smoothing=config["smoothing"])


def validate(model, data):
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
    optimizer = build_optimizer(model, config)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: schedule(epoch, config))
    for epoch in range(config["epochs"]):
        model.train()
        for x, y in shuffled_batches(*data["train"], config["batch_size"], torch.Generator().manual_seed(epoch)):
            optimizer.zero_grad()
            training_loss(model, config, (erased(x, config["reprob"]), y)).backward()
            optimizer.step()
        scheduler.step()
        tune.report(validate(model, data))
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
