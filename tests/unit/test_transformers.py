"""Hugging Face's Trainer as a problem, with transformers itself, without Ray."""

from __future__ import annotations

import importlib
import tempfile
from typing import Any

import pytest
import torch
from ray import tune
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from raybilevel.errors import ConfigError, ProblemError
from raybilevel.problem import make_model
from raybilevel.transformers import TrainerProblem, from_trainer
from tests.adapter_problems import CLASSES, FEATURES, ROWS, differences, ended, examples, hypergradient, with_gradients

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

CONFIG = {"learning_rate": 0.5, "weight_decay": 0.1, "label_smoothing_factor": 0.2, "num_train_epochs": 3}
SPACE = {
    "learning_rate": tune.loguniform(1e-3, 1.0),
    "weight_decay": tune.loguniform(1e-3, 1.0),
    "label_smoothing_factor": tune.uniform(0.01, 0.4),
}


class Softmax(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = transformers.PretrainedConfig()
        self.linear = nn.Linear(FEATURES, CLASSES)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.linear(x)
        return {"logits": logits} if labels is None else {"loss": cross_entropy(logits, labels), "logits": logits}


def rows(seed: int, dtype: torch.dtype = torch.float32) -> list[dict[str, Any]]:
    return [{"x": x, "labels": label} for x, label in zip(*examples(seed, dtype=dtype), strict=True)]


def accuracy(predictions: Any) -> dict[str, float]:
    return {"accuracy": float((predictions.predictions.argmax(1) == predictions.label_ids).mean())}


def trainer_of(config: Any, model: Any = Softmax, kind: Any = None, **options: Any) -> Any:
    kind = kind or transformers.Trainer
    settings: dict[str, Any] = {
        "optim": "sgd", "per_device_train_batch_size": ROWS // 2, "per_device_eval_batch_size": 25,
        "lr_scheduler_type": "constant", "max_grad_norm": 0.0, **config,
    }  # fmt: skip
    arguments = transformers.TrainingArguments(
        tempfile.gettempdir(), use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no",
        logging_strategy="no", **settings,
    )  # fmt: skip
    data: dict[str, Any] = {"train_dataset": rows(0), "eval_dataset": rows(1), "compute_metrics": accuracy, **options}
    return kind(model(), arguments, **data)


def test_what_stands_in_the_loss_has_gradients() -> None:
    assert with_gradients(from_trainer(trainer_of), SPACE) == {"weight_decay", "label_smoothing_factor"}
    # That of AdamW is no part of a loss.
    adam = from_trainer(lambda config: trainer_of({**config, "optim": "adamw_torch"}))
    assert with_gradients(adam, SPACE) == {"label_smoothing_factor"}


def test_f_has_the_smoothing_and_the_decay_and_f_of_the_upper_level_has_neither() -> None:
    problem = from_trainer(trainer_of)
    model: Any = make_model(problem, CONFIG).eval()
    nn.init.normal_(model.linear.weight)
    batch = next(iter(problem.batches("lower", None, CONFIG)))
    x, y = examples(0)
    assert torch.equal(batch["x"], x[: ROWS // 2]) and torch.equal(batch["labels"], y[: ROWS // 2])
    logits = model.linear(batch["x"])
    by_hand = cross_entropy(logits, batch["labels"], label_smoothing=0.2) + 0.05 * model.linear.weight.square().sum()
    torch.testing.assert_close(problem.lower_loss(model, CONFIG, batch), by_hand)
    torch.testing.assert_close(problem.upper_loss(model, CONFIG, batch), cross_entropy(logits, batch["labels"]))
    assert "labels" in batch


def test_hypergradients_are_differences_of_trained_f() -> None:
    def trainer(config: Any) -> Any:
        settings = {"learning_rate": 0.5, "optim_args": "momentum=0.8", "num_train_epochs": 120}
        return trainer_of(
            {**settings, "per_device_train_batch_size": ROWS, **config}, lambda: Softmax().double(),
            train_dataset=rows(0, torch.double), eval_dataset=rows(1, torch.double),
        )  # fmt: skip

    problem = from_trainer(trainer)
    problem.dtype = torch.double
    config = {"weight_decay": 0.1, "label_smoothing_factor": 0.2}
    found = hypergradient(problem, config)
    assert found == pytest.approx(differences(problem, config, found, 1e-3), rel=1e-3)
    assert min(map(abs, found.values())) > 1e-3


def test_a_loss_of_the_users_own_is_taken_with_its_hyperparameters() -> None:
    class Focused(transformers.Trainer):  # type: ignore[misc, name-defined]
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **rest: Any) -> Any:
            outputs = model(x=inputs["x"])
            loss = self.focus * cross_entropy(outputs["logits"], inputs["labels"])
            return (loss, outputs) if return_outputs else loss

    def subclass(config: Any) -> Any:
        trainer = trainer_of({}, kind=Focused)
        trainer.focus = config["focus"]
        return trainer

    def function(config: Any) -> Any:
        def loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Tensor:
            return config["focus"] * cross_entropy(outputs["logits"], labels)

        return trainer_of({}, compute_loss_func=loss)

    for make in (subclass, function):
        problem = from_trainer(make)
        model, focus = make_model(problem, {"focus": 3.0}), torch.tensor(3.0, requires_grad=True)
        batch = next(iter(problem.batches("lower", None, {"focus": 3.0})))
        loss = problem.lower_loss(model, {"focus": focus}, batch)
        (slope,) = torch.autograd.grad(loss, focus)
        assert slope.item() == pytest.approx(loss.item() / 3)
        upper = problem.upper_loss(model, {"focus": focus}, batch)  # which has it, too
        assert torch.autograd.grad(upper, focus)[0].item() == pytest.approx(slope.item())
    problem = from_trainer(subclass, upper_loss=lambda trainer, batch: trainer.model(**batch)["loss"])
    assert not torch.equal(problem.upper_loss(make_model(problem, {"focus": 3.0}), {"focus": focus}, batch), upper)


@pytest.mark.parametrize(("metric", "names"), [("eval_val_loss", "eval_test_accuracy"), ("val_loss", "test_accuracy")])
def test_a_training_ends_with_trainers_own_metrics(metric: str, names: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []

    class Report(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        def on_evaluate(self, *given: Any, **named: Any) -> None:
            called.append(named["metrics"])

    def trainer(config: Any) -> Any:
        data = {"val": rows(1), "test": rows(2)}
        return trainer_of(config, eval_dataset=data, callbacks=[Report()])

    concluded: list[Any] = []
    monkeypatch.setattr("raybilevel._adapters.adapter.conclude", lambda *given, **named: concluded.append(named))
    problem = from_trainer(trainer, metric=metric)
    problem(CONFIG)
    (end,) = concluded
    assert end["passes"] == 3.0 and names in end["metrics"]
    assert not any("runtime" in name or "per_second" in name for name in end["metrics"])
    assert called == []
    # Two steps an epoch.
    assert {round(time.item(), 4) for time in end["trained_time"].values()} == {3 * 2 * 0.5}
    assert torch.equal(next(iter(problem.batches("upper", None, CONFIG)))["x"], examples(1)[0][:25])
    other = from_trainer(trainer, metric=metric, eval_dataset="test")
    assert torch.equal(next(iter(other.batches("upper", None, CONFIG)))["x"], examples(2)[0][:25])


def test_the_best_model_has_the_share_of_its_steps(tmp_path: Any) -> None:
    class Worse(transformers.Trainer):  # type: ignore[misc, name-defined]
        """F rises from the second epoch on."""

        def compute_loss(self, *given: Any, **named: Any) -> Any:
            loss = super().compute_loss(*given, **named)
            return -loss if self.model.training and self.state.global_step >= 2 else loss

    settings = {
        **CONFIG, "eval_strategy": "epoch", "load_best_model_at_end": True, "save_strategy": "epoch",
        "metric_for_best_model": "loss", "greater_is_better": False,
    }  # fmt: skip

    def trainer(config: Any) -> Any:
        arguments = transformers.TrainingArguments(
            str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True, optim="sgd",
            per_device_train_batch_size=ROWS // 2, **config,
        )  # fmt: skip
        return Worse(Softmax(), arguments, train_dataset=rows(0), eval_dataset=rows(1))

    trained = from_trainer(trainer).train_model(settings)
    assert trained.passes == 3.0 and trained.share == pytest.approx(1 / 3)


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ProblemError, match="from_trainer: expected a function that makes a Trainer, got Softmax"):
        ended(from_trainer(lambda config: Softmax()), CONFIG)
    for name in ("train_dataset", "eval_dataset"):
        problem: TrainerProblem = from_trainer(lambda config, name=name: trainer_of(config, **{name: None}))
        with pytest.raises(ProblemError, match=f"the Trainer has no {name}"):
            list(problem.batches("lower", None, CONFIG))
    with pytest.raises(ConfigError, match="trainer must be a class or a function of the config, got int"):
        from_trainer(3)  # type: ignore[arg-type]

    def absent(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(ConfigError, match=r"from_trainer needs: pip install 'raybilevel\[transformers\]'"):
        from_trainer(trainer_of)
