"""torchvision's reference recipe for classification: SGD, decay of norms and biases apart, clipping, accumulation, AMP.

The classes are unequally frequent in the training data, and equally in the rest.
"""

import torch
from ray import tune
from sample_data import cifar10, digits, shuffled_batches
from search_algorithms import command_line, search_algorithm
from torch import nn
from torch.nn.functional import cross_entropy

SPACE = {
    "width": tune.choice([8, 16, 32]),
    "lr": tune.loguniform(1e-2, 1e0),
    "momentum": tune.uniform(0.5, 0.95),
    "weight_decay": tune.loguniform(1e-6, 1e-1),
    "norm_weight_decay": tune.loguniform(1e-6, 1e-1),
    "bias_weight_decay": tune.loguniform(1e-6, 1e-1),
    "label_smoothing": tune.uniform(0.0, 0.3),
    "class_balance": tune.uniform(0.0, 1.5),
    "clip_grad_norm": tune.loguniform(0.1, 10.0),
    "accumulation": tune.choice([1, 2, 4]),
    "epochs": 20,
    "batch_size": 16,
}


def load_data(data=None):
    data = cifar10(data) if data else digits(train=800)
    x, y = data["train"]
    # Of class c a share of 0.75^c is kept: all zeros, one nine in thirteen.
    kept = torch.rand(len(y), generator=torch.Generator().manual_seed(0)) < 0.75**y
    return data | {"train": (x[kept], y[kept])}


def build_model(config, x):
    torch.manual_seed(config.get("seed", 0))
    width = config["width"]
    return nn.Sequential(
        nn.Conv2d(x.shape[1], width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveMaxPool2d(4),
        nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
        nn.Flatten(), nn.Linear(8 * width, 10),
    )  # fmt: skip


def parameter_groups(model, config):
    """As `torchvision.ops._utils.split_normalization_params` and `--bias-weight-decay` of the reference have them."""
    groups = {"weight_decay": [], "norm_weight_decay": [], "bias_weight_decay": []}
    for module in model:
        for name, p in module.named_parameters():
            norm = isinstance(module, nn.BatchNorm2d)
            kind = "norm_weight_decay" if norm else "bias_weight_decay" if name == "bias" else "weight_decay"
            groups[kind].append(p)
    return [{"params": params, "weight_decay": config[kind]} for kind, params in groups.items()]


def class_weights(y, balance):
    """Weights by frequency to the power of -balance, with mean 1 over the examples: 0 for none, 1 for equal classes."""
    weights = torch.bincount(y, minlength=10).clamp(min=1).float() ** -balance
    return weights / weights[y].mean()


def training_loss(model, config, batch, labels):
    x, y = batch
    weight = class_weights(labels, config["class_balance"])
    return cross_entropy(model(x), y, weight, label_smoothing=config["label_smoothing"], reduction="sum") / len(y)


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
    x, labels = data["train"]
    model = build_model(config, x)
    groups = parameter_groups(model, config)
    optimizer = torch.optim.SGD(groups, lr=config["lr"], momentum=config["momentum"], nesterov=True)
    steps = config["epochs"] * -(-len(x) // config["batch_size"]) // config["accumulation"]
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps + 1)
    batches = 0
    for epoch in range(1, config["epochs"] + 1):
        model.train()
        for batch in shuffled_batches(x, labels, config["batch_size"], torch.Generator().manual_seed(epoch)):
            with torch.autocast("cpu", torch.bfloat16):
                loss = training_loss(model, config, batch, labels)
            (loss / config["accumulation"]).backward()
            batches += 1
            if batches % config["accumulation"] == 0:
                nn.utils.clip_grad_norm_(model.parameters(), config["clip_grad_norm"])
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
        tune.report(evaluate(model, data))
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
