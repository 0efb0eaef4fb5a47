"""Nets of skorch as problems, with skorch itself, without Ray."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from ray import tune
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from raybilevel.errors import ConfigError, ProblemError
from raybilevel.problem import make_model
from raybilevel.skorch import from_net
from tests.adapter_problems import CLASSES, FEATURES, ROWS, differences, ended, examples, hypergradient, with_gradients

skorch = pytest.importorskip("skorch", reason="skorch is not installed")

CONFIG = {"lr": 0.5, "decay": 0.1, "smoothing": 0.2}
SPACE = {
    "lr": tune.loguniform(1e-3, 1.0),
    "decay": tune.loguniform(1e-3, 1.0),
    "smoothing": tune.uniform(0.01, 0.4),
}


class Softmax(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, CLASSES, dtype=dtype)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x)
        return out


def split(data: Any, y: Any) -> Any:
    """The second half of the examples is for validation."""
    return torch.utils.data.Subset(data, range(ROWS)), torch.utils.data.Subset(data, range(ROWS, 2 * ROWS))


def data_of(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    x, y = examples(0, 2 * ROWS, dtype)
    return x.numpy(), y.numpy()


def net_of(config: Any, kind: Any = None, **options: Any) -> Any:
    settings = {
        "lr": config["lr"], "max_epochs": 3, "train_split": split, "verbose": 0, "batch_size": 40,
        "optimizer__momentum": 0.8, **options,
    }  # fmt: skip
    return (kind or skorch.NeuralNetClassifier)(
        Softmax, criterion=nn.CrossEntropyLoss, criterion__label_smoothing=config["smoothing"],
        optimizer__weight_decay=config["decay"],
        **{name: value for name, value in settings.items() if value is not None},
    )  # fmt: skip


def test_what_stands_in_the_loss_has_gradients() -> None:
    assert with_gradients(from_net(net_of, data_of()), SPACE) == {"decay", "smoothing"}
    # That of AdamW is no part of a loss.
    adamw = {"optimizer": torch.optim.AdamW, "optimizer__momentum": None}
    assert with_gradients(from_net(lambda config: net_of(config, **adamw), data_of), SPACE) == {"smoothing"}


def test_f_has_the_decay_of_the_optimizer() -> None:
    problem = from_net(net_of, data_of(), upper_loss=cross_entropy)
    model: Any = make_model(problem, CONFIG)
    nn.init.normal_(model.linear.weight)
    batches = list(problem.batches("lower", None, CONFIG))
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert torch.equal(x, torch.tensor(data_of()[0][:ROWS])) and len(batches) == 2
    logits = model.linear(x)
    by_hand = cross_entropy(logits, y, label_smoothing=0.2) + 0.05 * model.linear.weight.square().sum()
    torch.testing.assert_close(problem.lower_loss(model, CONFIG, (x, y)), by_hand)
    torch.testing.assert_close(problem.upper_loss(model, CONFIG, (x, y)), cross_entropy(logits, y))
    smoothed = from_net(net_of, data_of()).upper_loss(model, CONFIG, (x, y))  # as the net's own valid_loss is
    torch.testing.assert_close(smoothed, cross_entropy(logits, y, label_smoothing=0.2))


@pytest.mark.parametrize("upper", [cross_entropy, None])
def test_hypergradients_are_differences_of_trained_f(upper: Any) -> None:
    def net(config: Any) -> Any:
        return net_of(
            {"lr": 0.3, **config}, module__dtype=torch.double, max_epochs=150, batch_size=ROWS,
        )  # fmt: skip

    problem = from_net(net, data_of(torch.double), upper_loss=upper)
    problem.dtype = torch.double
    config = {"decay": 0.1, "smoothing": 0.2}
    found = hypergradient(problem, config)
    assert found == pytest.approx(differences(problem, config, found, 1e-3), rel=1e-3)
    assert min(map(abs, found.values())) > 1e-3


def test_a_loss_of_the_users_own_is_taken_with_its_hyperparameters() -> None:
    class Penalised(skorch.NeuralNetClassifier):  # type: ignore[misc, name-defined]
        def __init__(self, *given: Any, penalty: float = 0.0, **named: Any) -> None:
            super().__init__(*given, **named)
            self.penalty = penalty

        def get_loss(self, y_pred: Any, y_true: Any, X: Any = None, training: bool = False) -> Any:
            loss = super().get_loss(y_pred, y_true, X=X, training=training)
            return loss + self.penalty * self.module_.linear.weight.abs().sum()

    problem = from_net(lambda config: net_of(CONFIG, Penalised, penalty=config["penalty"]), data_of())
    model: Any = make_model(problem, {"penalty": 0.3})
    nn.init.normal_(model.linear.weight)
    penalty = torch.tensor(0.3, requires_grad=True)
    batch = next(iter(problem.batches("lower", None, {"penalty": 0.3})))
    (slope,) = torch.autograd.grad(problem.lower_loss(model, {"penalty": penalty}, batch), penalty)
    torch.testing.assert_close(slope, model.linear.weight.abs().sum().detach())


def test_a_trial_concludes_with_its_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    concluded: list[Any] = []
    monkeypatch.setattr("raybilevel._adapters.adapter.conclude", lambda *given, **named: concluded.append(named))
    x, y = data_of()
    from_net(net_of, (x, y), evaluate=lambda net: {"accuracy": net.score(x, y)})(CONFIG)
    (end,) = concluded
    assert end["passes"] == 3.0 and end["metrics"]["accuracy"] > 0.5
    # Two steps an epoch.
    assert {round(time.item(), 4) for time in end["trained_time"].values()} == {3 * 2 * 0.5 / 0.2}


@pytest.mark.parametrize("kind", ["EarlyStopping", "Checkpoint"])
def test_weights_that_a_callback_has_loaded_have_the_share_of_their_epochs(kind: str, tmp_path: Any) -> None:
    class Worse(skorch.NeuralNetClassifier):  # type: ignore[misc, name-defined]
        """F rises from the second epoch on."""

        def get_loss(self, *given: Any, training: bool = False, **named: Any) -> Any:
            loss = super().get_loss(*given, training=training, **named)
            return -loss if training and len(self.history) > 1 else loss

    options = {"EarlyStopping": {"patience": 3}, "Checkpoint": {"dirname": str(tmp_path)}}[kind]
    callback = getattr(skorch.callbacks, kind)(load_best=True, **options)
    callbacks = [("best", callback)]
    trained = from_net(lambda config: net_of(config, Worse, max_epochs=4, callbacks=callbacks), data_of()).train_model(
        CONFIG
    )
    assert trained.passes == 4.0 and trained.share == 0.25


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ProblemError, match="from_net: expected a function that makes a NeuralNet, got Softmax"):
        ended(from_net(lambda config: Softmax(), data_of()), CONFIG)
    problem = from_net(lambda config: net_of(config).set_params(train_split=None), data_of())
    with pytest.raises(ProblemError, match="the net has no validation examples; give it a train_split"):
        list(problem.batches("upper", None, CONFIG))

    def absent(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(ConfigError, match=r"from_net needs: pip install 'raybilevel\[skorch\]'"):
        from_net(net_of, data_of())
