"""A small GPT on the characters of ten sonnets: AdamW without decay of norms and biases, warm-up, cosine schedule."""

import math
from pathlib import Path

import torch
from ray import tune
from search_algorithms import command_line, search_algorithm
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

TEXT = Path(__file__).with_name("sonnets.txt")
CONTEXT = 32  # characters

SPACE = {
    "layers": tune.randint(1, 4),
    "heads": tune.choice([1, 2, 4]),
    "width": tune.choice([32, 48, 64]),
    "dropout": tune.uniform(0.0, 0.4),
    "lr": tune.loguniform(1e-3, 3e-2),
    "beta2": tune.uniform(0.9, 0.999),
    "weight_decay": tune.loguniform(1e-3, 1e0),
    "warmup": tune.randint(0, 100),
    "label_smoothing": tune.uniform(0.0, 0.2),
    "clip": tune.loguniform(0.1, 10.0),
    "steps": 400,
}


def load_data():
    """Codes of characters: six sonnets to train on, two to validate, two to test; and the number of characters."""
    text = TEXT.read_text()
    characters = sorted(set(text))
    sonnets = text.split("\n\n")
    parts = {"train": sonnets[:6], "val": sonnets[6:8], "test": sonnets[8:]}
    codes = {name: torch.tensor([characters.index(c) for c in "\n\n".join(part)]) for name, part in parts.items()}
    return codes, len(characters)


class Block(nn.Module):
    def __init__(self, width, heads, dropout):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.drop = nn.Dropout(dropout)

    def attention(self, x):
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        p = self.dropout if self.training else 0.0
        return self.out(scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True).transpose(1, 2).flatten(2))

    def forward(self, x):
        x = x + self.drop(self.attention(self.norm1(x)))
        return x + self.drop(self.mlp(self.norm2(x)))


class GPT(nn.Module):
    def __init__(self, config, vocabulary):
        super().__init__()
        width = config["width"]
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(
            *(Block(width, config["heads"], config["dropout"]) for _ in range(config["layers"]))
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, codes):
        x = self.tokens(codes) + self.positions(torch.arange(codes.shape[1]))
        return self.head(self.norm(self.blocks(x)))


def build_model(config, vocabulary):
    torch.manual_seed(config.get("seed", 0))
    return GPT(config, vocabulary)


def build_optimizer(model, config):
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": config["weight_decay"]},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config["lr"], betas=(0.9, config["beta2"]))


def schedule(step, config):
    """The share of the learning rate at a step."""
    if step < config["warmup"]:
        return (step + 1) / (config["warmup"] + 1)
    progress = (step - config["warmup"]) / (config["steps"] - config["warmup"])
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


def windows(codes, starts):
    """Pieces of the text and, of the same shape, the character that follows each of theirs."""
    rows = starts[:, None] + torch.arange(CONTEXT)
    return codes[rows], codes[rows + 1]


def training_loss(model, config, batch):
    x, y = batch
    return cross_entropy(model(x).flatten(0, 1), y.flatten(), label_smoothing=config["label_smoothing"])


def evaluate(model, codes):
    """Nats a character."""
    model.eval()
    x, y = windows(codes, torch.arange(0, len(codes) - CONTEXT, CONTEXT // 4))
    with torch.no_grad():
        return cross_entropy(model(x).flatten(0, 1), y.flatten()).item()


def fit(config):
    codes, vocabulary = load_data()
    model = build_model(config, vocabulary)
    optimizer = build_optimizer(model, config)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, config))
    generator = torch.Generator().manual_seed(0)
    for step in range(1, config["steps"] + 1):
        model.train()
        starts = torch.randint(len(codes["train"]) - CONTEXT, (16,), generator=generator)
        optimizer.zero_grad()
        training_loss(model, config, windows(codes["train"], starts)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), config["clip"])
        optimizer.step()
        scheduler.step()
        if step % 100 == 0 or step == config["steps"]:
            tune.report({"val_loss": evaluate(model, codes["val"]), "test_loss": evaluate(model, codes["test"])})
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
