"""Scripts of frameworks on a real local Ray: their searches have hypergradients."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from ray import tune
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from raybilevel import BilevelSearch
from raybilevel._adapters.adapter import Adapter
from tests.adapter_problems import CLASSES, FEATURES, ROWS, examples

pytestmark = [
    pytest.mark.usefixtures("local_ray"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # Lightning's, of torch 2.13
]

TRIALS = 6
EPOCHS = 30  # long enough for hypergradients to pay
DECAY = {"decay": tune.loguniform(1e-4, 1.0)}


def fit(problem: Adapter, space: dict[str, Any], folder: Path) -> BilevelSearch:
    search = BilevelSearch(problem, max_concurrent=2)
    results = tune.Tuner(
        problem,
        param_space=space,
        tune_config=tune.TuneConfig(
            search_alg=search, metric=problem.upper_metric, mode="min", num_samples=TRIALS, reuse_actors=True
        ),
        run_config=tune.RunConfig(name="run", storage_path=str(folder), verbose=0),
    ).fit()
    assert not results.errors
    best = results.get_best_result().metrics
    assert best["lower_level_finished"] and best[problem.upper_metric] == best["upper_loss"]
    return search


def check(search: BilevelSearch) -> None:
    assert {training.status for training in search.state.trainings} == {"done"}
    assert any(training.hypergradient for training in search.state.trainings)


def test_lightning(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")
    from raybilevel.lightning import from_lightning

    class Softmax(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self, decay: float) -> None:
            super().__init__()
            self.decay = decay
            self.linear = nn.Linear(FEATURES, CLASSES)

        def training_step(self, batch: Any) -> Any:
            return cross_entropy(self.linear(batch[0]), batch[1])

        def validation_step(self, batch: Any) -> None:
            self.log("val_loss", cross_entropy(self.linear(batch[0]), batch[1]))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1.0, weight_decay=self.decay)

    class Data(lightning.LightningDataModule):  # type: ignore[misc, name-defined]
        def train_dataloader(self) -> Any:
            return DataLoader(TensorDataset(*examples(0)), ROWS)

        def val_dataloader(self) -> Any:
            return DataLoader(TensorDataset(*examples(1)), ROWS)

    trainer = {
        "max_epochs": EPOCHS, "accelerator": "cpu", "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "enable_checkpointing": False,
    }  # fmt: skip
    search = fit(from_lightning(Softmax, Data, trainer), DECAY, tmp_path)
    check(search)
    assert {training.passes for training in search.state.done} == {EPOCHS + 1.0}


@pytest.mark.slow
def test_hyperparameter_search_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    from raybilevel.transformers import from_trainer

    class Softmax(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = transformers.PretrainedConfig()
            self.linear = nn.Linear(FEATURES, CLASSES)

        def forward(self, x: Any, labels: Any = None) -> Any:
            logits = self.linear(x)
            return {"loss": cross_entropy(logits, labels), "logits": logits}

    def rows(seed: int) -> list[Any]:
        return [{"x": x, "labels": label} for x, label in zip(*examples(seed), strict=True)]

    def trainer(config: Any) -> Any:
        arguments = transformers.TrainingArguments(
            tempfile.gettempdir(), use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no",
            logging_strategy="no", eval_strategy="epoch", optim="sgd", learning_rate=1.0, num_train_epochs=EPOCHS,
            per_device_train_batch_size=ROWS, lr_scheduler_type="constant", **config,
        )  # fmt: skip
        return transformers.Trainer(args=arguments, model_init=Softmax, train_dataset=rows(0), eval_dataset=rows(1))

    problem = from_trainer(trainer, metric="objective")
    search = BilevelSearch(problem, max_concurrent=2)
    one = trainer({})
    one.add_callback(problem.callback())
    best = one.hyperparameter_search(
        lambda _: {"weight_decay": tune.loguniform(1e-4, 1.0)}, n_trials=TRIALS, direction="minimize", backend="ray",
        search_alg=search, storage_path=str(tmp_path), verbose=0, progress_reporter=None, reuse_actors=True,
    )  # fmt: skip
    check(search)
    assert search.best is not None and best.objective == search.best.upper_loss


@pytest.mark.slow
def test_skorch(tmp_path: Path) -> None:
    skorch = pytest.importorskip("skorch", reason="skorch is not installed")
    from raybilevel.skorch import from_net

    def net(config: Any) -> Any:
        return skorch.NeuralNetClassifier(
            nn.Linear, module__in_features=FEATURES, module__out_features=CLASSES, criterion=nn.CrossEntropyLoss,
            optimizer__weight_decay=config["decay"], lr=1.0, max_epochs=EPOCHS, verbose=0,
        )  # fmt: skip

    x, y = examples(0, 2 * ROWS)
    check(fit(from_net(net, (x.numpy(), y.numpy())), DECAY, tmp_path))


def test_scikit_learn(tmp_path: Path) -> None:
    from sklearn.linear_model import SGDClassifier

    from raybilevel.sklearn import from_estimator

    def estimator(alpha: float, positive: float) -> SGDClassifier:
        return SGDClassifier(
            loss="log_loss", alpha=alpha, class_weight={0: positive}, max_iter=EPOCHS, tol=None, random_state=0
        )

    data = [tuple(part.numpy() for part in examples(seed)) for seed in range(2)]
    space = {"alpha": tune.loguniform(1e-3, 1.0), "positive": tune.loguniform(0.1, 10.0)}
    check(fit(from_estimator(estimator, *data), space, tmp_path))
