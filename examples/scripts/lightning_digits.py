"""A Lightning module and data module: Trainer.fit with early stopping, gradient clipping and a callback for Tune."""

import logging
import warnings

import lightning
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping
from ray import tune
from sample_data import digits
from search_algorithms import command_line, search_algorithm
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

SPACE = {
    "layers": tune.randint(1, 4),
    "width": tune.choice([32, 64, 128, 256]),
    "activation": tune.choice(["ReLU", "Tanh", "GELU"]),
    "optimizer": tune.choice(["Adam", "SGD"]),
    "lr": tune.loguniform(1e-3, 1e-1),
    "weight_decay": tune.loguniform(1e-6, 1e-1),
    "label_smoothing": tune.uniform(0.0, 0.3),
    "dropout": tune.uniform(0.0, 0.6),
    "batch_size": tune.choice([16, 32, 64]),
    "clip": tune.loguniform(0.1, 10.0),
    "epochs": 25,
}


def load_data():
    return digits(train=300)


class Digits(lightning.LightningDataModule):
    def __init__(self, batch_size):
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self):
        return DataLoader(TensorDataset(*load_data()["train"]), self.batch_size, shuffle=True)

    def val_dataloader(self):
        return [DataLoader(TensorDataset(*load_data()[name]), 1000) for name in ("val", "test")]


class Classifier(lightning.LightningModule):
    def __init__(self, config):
        super().__init__()
        self.config = config
        layers, inputs = [nn.Flatten()], 64
        for _ in range(config["layers"]):
            activation = getattr(nn, config["activation"])()
            layers += [nn.Linear(inputs, config["width"]), activation, nn.Dropout(config["dropout"])]
            inputs = config["width"]
        self.net = nn.Sequential(*layers, nn.Linear(inputs, 10))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, _):
        return training_loss(self, self.config, batch)

    def validation_step(self, batch, _, dataloader_idx):
        x, y = batch
        name, logits = ("val", "test")[dataloader_idx], self(x)
        self.log(f"{name}_loss", cross_entropy(logits, y), add_dataloader_idx=False)
        self.log(f"{name}_accuracy", (logits.argmax(1) == y).float().mean(), add_dataloader_idx=False)

    def configure_optimizers(self):
        settings = {"lr": self.config["lr"], "weight_decay": self.config["weight_decay"]}
        if self.config["optimizer"] == "SGD":
            return torch.optim.SGD(self.parameters(), momentum=0.9, **settings)
        return torch.optim.Adam(self.parameters(), **settings)


def build_model(config):
    lightning.seed_everything(config.get("seed", 0), verbose=False)
    return Classifier(config)


def training_loss(model, config, batch):
    x, y = batch
    return cross_entropy(model(x), y, label_smoothing=config["label_smoothing"])


class Report(Callback):
    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            tune.report({name: value.item() for name, value in trainer.callback_metrics.items()})


def build_trainer(config):
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    return lightning.Trainer(
        max_epochs=config["epochs"],
        gradient_clip_val=config["clip"],
        callbacks=[EarlyStopping("val_loss", patience=5), Report()],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def trainable(config):
    build_trainer(config).fit(build_model(config), Digits(config["batch_size"]))


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
