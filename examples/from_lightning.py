"""A Lightning module as it stands: weight decay, label smoothing and a learning rate. Needs raybilevel[lightning]."""

import logging
import warnings

import lightning
import torch
from lightning.pytorch.callbacks import EarlyStopping
from ray import tune
from sklearn.datasets import load_breast_cancer
from sklearn.preprocessing import scale
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from raybilevel import BilevelSearch
from raybilevel.lightning import from_lightning

SPACE = {
    "lr": tune.loguniform(1e-3, 1e-1),
    "weight_decay": tune.loguniform(1e-5, 1e0),
    "label_smoothing": tune.uniform(0.0, 0.3),
}


class Tumours(lightning.LightningDataModule):
    def setup(self, stage):
        x, y = load_breast_cancer(return_X_y=True)
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
        x, y = torch.tensor(scale(x), dtype=torch.float32)[order], torch.tensor(y)[order]
        self.train, self.val = TensorDataset(x[:60], y[:60]), TensorDataset(x[60:200], y[60:200])

    def train_dataloader(self):
        return DataLoader(self.train, 20, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.val, 140)


class Classifier(lightning.LightningModule):
    def __init__(self, lr, weight_decay, label_smoothing):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, 2))

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = cross_entropy(self.net(x), y, label_smoothing=self.hparams.label_smoothing)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", cross_entropy(self.net(x), y))

    def configure_optimizers(self):
        return torch.optim.SGD(
            self.parameters(), lr=self.hparams.lr, momentum=0.9, weight_decay=self.hparams.weight_decay
        )


def trainer():
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*(does not have many workers|number of training batches).*")
    return lightning.Trainer(
        max_epochs=40,
        callbacks=[EarlyStopping("val_loss", patience=10)],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


if __name__ == "__main__":
    problem = from_lightning(Classifier, Tumours, trainer)
    settings = tune.TuneConfig(
        search_alg=BilevelSearch(problem), metric="val_loss", mode="min", num_samples=10, reuse_actors=True
    )
    results = tune.Tuner(problem, param_space=SPACE, tune_config=settings, run_config=tune.RunConfig(verbose=0)).fit()
    best = results.get_best_result()
    print("best hyperparameters:", best.config)
    print(f"validation loss {best.metrics['val_loss']:.4f}")
