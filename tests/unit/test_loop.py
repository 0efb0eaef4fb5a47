"""Loops of plain PyTorch, written as functions, as problems."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from ray import tune
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from raybilevel.errors import ConfigError, ProblemError
from raybilevel.loop import LoopProblem, from_loop
from raybilevel.problem import make_model
from tests.adapter_problems import CLASSES, FEATURES, differences, ended, examples, hypergradient, with_gradients

CONFIG = {"lr": 0.5, "decay": {"weight": 0.1, "bias": 0.05}, "smoothing": 0.2, "epochs": 120}
SPACE = {
    "lr": tune.loguniform(1e-3, 1.0),
    "decay": {"weight": tune.loguniform(1e-3, 1.0), "bias": tune.loguniform(1e-3, 1.0)},
    "smoothing": tune.uniform(0.01, 0.4),
}


def build_model(config: Any) -> nn.Module:
    model = nn.Linear(FEATURES, CLASSES, dtype=torch.double)
    for weight in model.parameters():
        nn.init.zeros_(weight)
    return model


def load_data() -> dict[str, Any]:
    return {name: examples(seed, dtype=torch.double) for seed, name in enumerate(("train", "val", "test"))}


def groups(model: Any, config: Any) -> list[Any]:
    return [
        {"params": [model.weight], "weight_decay": config["decay"]["weight"]},
        {"params": [model.bias], "weight_decay": config["decay"]["bias"]},
    ]


def training_loss(model: Any, config: Any, batch: Any) -> Tensor:
    x, y = batch
    return cross_entropy(model(x), y, label_smoothing=config["smoothing"])


def validation_loss(model: Any, batch: Any) -> Tensor:
    x, y = batch
    return cross_entropy(model(x), y)


def fit(config: Any) -> nn.Module:
    model, data = build_model(config), load_data()
    optimizer = torch.optim.SGD(groups(model, config), lr=config["lr"], momentum=0.8)
    for _ in range(config["epochs"]):
        optimizer.zero_grad()
        training_loss(model, config, data["train"]).backward()
        optimizer.step()
    return model


def problem_of(**options: Any) -> LoopProblem:
    settings: dict[str, Any] = {
        "fit": fit, "model": build_model, "data": load_data, "lower_loss": training_loss,
        "upper_loss": validation_loss, "weight_decay": groups, **options,
    }  # fmt: skip
    problem = from_loop(settings.pop("fit"), **settings)
    problem.dtype = torch.double
    return problem


def test_what_stands_in_the_loss_has_gradients() -> None:
    assert with_gradients(problem_of(), SPACE) == {"decay/weight", "decay/bias", "smoothing"}
    assert with_gradients(problem_of(weight_decay=None), SPACE) == {"smoothing"}
    assert with_gradients(problem_of(weight_decay="decay/weight"), SPACE) == {"decay/weight", "smoothing"}


def test_hypergradients_are_differences_of_trained_f() -> None:
    problem = problem_of()
    found = hypergradient(problem, CONFIG)
    assert found.pop("lr") == 0.0
    assert found == pytest.approx(differences(problem, CONFIG, found, 1e-3), rel=1e-3)


def test_f_may_depend_on_hyperparameters_itself() -> None:
    problem = problem_of(upper_loss=lambda model, config, batch: validation_loss(model, batch) * config["smoothing"])
    found = hypergradient(problem, CONFIG)
    assert found["smoothing"] == pytest.approx(differences(problem, CONFIG, ["smoothing"], 1e-3)["smoothing"], rel=1e-3)


def test_batches_are_one_or_several() -> None:
    x, y = examples(0, dtype=torch.double)
    pair = [(x[:20], y[:20]), (x[20:], y[20:])]
    loader = DataLoader(TensorDataset(x, y), 40, shuffle=True)
    for train, sizes in (((x, y), [60]), (pair, [20, 40]), (loader, [40, 20])):
        found = list(problem_of(data={"train": train, "val": (x, y)}).batches("lower", None, CONFIG))
        assert [len(batch[0]) for batch in found] == sizes
        assert torch.equal(torch.cat([batch[0] for batch in found]), x)


def test_data_are_read_once_for_a_config() -> None:
    read = []

    def data(smoothing: float) -> Any:
        read.append(smoothing)
        return load_data()

    problem = problem_of(data=data)
    for _ in range(2):
        list(problem.batches("lower", None, CONFIG))
        list(problem.batches("upper", None, CONFIG))
    list(problem.batches("upper", None, {**CONFIG, "smoothing": 0.3}))
    assert read == [0.2, 0.3]


def test_a_trial_concludes_with_the_time_and_metrics_of_its_training(monkeypatch: pytest.MonkeyPatch) -> None:
    concluded: list[Any] = []
    monkeypatch.setattr("raybilevel._adapters.adapter.conclude", lambda *given, **named: concluded.append(named))
    problem_of()(CONFIG)
    (end,) = concluded
    assert end["passes"] == 120.0
    assert {round(time.item(), 6) for time in end["trained_time"].values()} == {120 * 0.5 / 0.2}
    problem = problem_of(evaluate=lambda model, config: {"test_loss": validation_loss(model, load_data()["test"])})
    losses = ended(problem, CONFIG).losses()
    assert 0 < losses["test_loss"] < math.log(CLASSES) and losses["val_loss"] == losses["upper_loss"]


def test_passes_are_what_the_loop_says() -> None:
    assert problem_of(fit=lambda config: (fit(config), 7)).train_model(CONFIG).passes == 7.0
    assert problem_of(passes=lambda config: config["lr"] * 2).train_model(CONFIG).passes == 1.0
    with pytest.raises(ConfigError, match="the config has no 'steps'; give passes"):
        problem_of(passes="steps").train_model(CONFIG)


def test_what_is_refused() -> None:
    with pytest.raises(ProblemError, match="from_loop: fit must return the trained model, got NoneType"):
        problem_of(fit=lambda config: None).train_model(CONFIG)
    with pytest.raises(ProblemError, match=r"data must be a dict with 'train' and 'val', got \['train'\]"):
        list(problem_of(data={"train": examples(0)}).batches("lower", None, CONFIG))
    with pytest.raises(ConfigError, match="upper_loss must be a class or a function of the config, got str"):
        problem_of(upper_loss="loss")
    assert make_model(problem_of(), CONFIG).weight.dtype == torch.double
