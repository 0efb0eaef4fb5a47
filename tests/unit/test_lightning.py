"""Lightning modules as problems, with Lightning itself, without Ray."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from ray import tune
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from raybilevel.errors import ConfigError, ProblemError
from raybilevel.lightning import LightningProblem, from_lightning
from raybilevel.problem import make_model
from tests.adapter_problems import CLASSES, FEATURES, ROWS, differences, ended, examples, hypergradient, with_gradients

lightning = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:lightning.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # of torch 2.13
]

CONFIG = {"lr": 0.5, "decay": 0.1, "smoothing": 0.1, "boost": 2.0, "epochs": 3}
SPACE = {
    "lr": tune.loguniform(1e-3, 1.0),
    "decay": tune.loguniform(1e-3, 1.0),
    "smoothing": tune.uniform(0.01, 0.4),
    "boost": tune.loguniform(0.2, 5.0),
}
QUIET = {
    "max_epochs": 3, "accelerator": "cpu", "logger": False, "enable_progress_bar": False,
    "enable_model_summary": False, "enable_checkpointing": False,
}  # fmt: skip


class Data(lightning.LightningDataModule):  # type: ignore[misc, name-defined]
    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(*examples(0)), ROWS // 2, shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(TensorDataset(*examples(1)), 25)


class Softmax(lightning.LightningModule):  # type: ignore[misc, name-defined]
    """Hyperparameters in the optimizer, in a layer and in `hparams`."""

    def __init__(self, lr: float, decay: float, smoothing: float, boost: float) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.linear = nn.Linear(FEATURES, CLASSES)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.criterion = nn.CrossEntropyLoss(label_smoothing=smoothing)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        logits = self.linear(x)
        first = (cross_entropy(logits, y, reduction="none") * (y == 0)).mean()
        loss = self.criterion(logits, y) + self.hparams.boost * first
        self.log("train_loss", loss)
        return {"loss": loss}

    def validation_step(self, batch: Any) -> None:
        x, y = batch
        self.log("val_loss", cross_entropy(self.linear(x), y))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(
            self.parameters(), lr=self.hparams.lr, momentum=0.8, weight_decay=self.hparams.decay
        )
        steps = int(self.trainer.estimated_stepping_batches)
        return [optimizer], [torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1.0, steps)]


def problem_of(module: Any = Softmax, data: Any = Data, trainer: Any = QUIET, **options: Any) -> LightningProblem:
    return from_lightning(module, data, trainer, **options)


def model_of(problem: LightningProblem, config: Any = CONFIG) -> Any:
    return make_model(problem, config).eval()


def test_what_stands_in_the_loss_has_gradients() -> None:
    assert with_gradients(problem_of(), SPACE) == {"decay", "smoothing", "boost"}
    assert with_gradients(problem_of(by_values=["decay", "boost"]), SPACE) == {"smoothing"}


def test_f_is_the_loss_of_the_step_with_the_decay_of_the_optimizer() -> None:
    problem = problem_of()
    model = model_of(problem)
    nn.init.normal_(model.linear.weight)
    x, y = batch = examples(0)
    logits = model.linear(x)
    by_hand = cross_entropy(logits, y, label_smoothing=0.1)
    by_hand = by_hand + 2.0 * (cross_entropy(logits, y, reduction="none") * (y == 0)).mean()
    by_hand = by_hand + 0.05 * sum(weight.square().sum() for weight in model.parameters())
    torch.testing.assert_close(problem.lower_loss(model, CONFIG, batch), by_hand)
    torch.testing.assert_close(problem.upper_loss(model, CONFIG, batch), cross_entropy(logits, y))
    given = {**CONFIG, "smoothing": torch.tensor(0.3, requires_grad=True)}
    problem.lower_loss(model, given, batch)
    # Afterwards the module is as it was.
    assert model.criterion.label_smoothing == 0.1 and "log" not in vars(model)


def test_hypergradients_are_differences_of_trained_f() -> None:
    class Full(Data):
        def train_dataloader(self) -> Any:
            return DataLoader(TensorDataset(*examples(0, dtype=torch.double)), ROWS)

        def val_dataloader(self) -> Any:
            return DataLoader(TensorDataset(*examples(1, dtype=torch.double)), 25)

    problem = problem_of(
        lambda config: Softmax(0.3, **config), Full, {**QUIET, "max_epochs": 120, "precision": "64-true"}
    )
    problem.dtype = torch.double
    config = {"decay": 0.1, "smoothing": 0.2, "boost": 1.5}
    found = hypergradient(problem, config)
    assert found == pytest.approx(differences(problem, config, found, 1e-3), rel=1e-3)
    assert min(map(abs, found.values())) > 1e-3


class Hidden(Softmax):
    def __init__(self, lr: float, decay: float, smoothing: float, boost: float) -> None:
        super().__init__(lr, decay, smoothing, boost)
        self.square = math.sqrt(boost)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return cross_entropy(self.linear(x), y) * (self.hparams.boost + self.square)


def test_a_use_that_gradients_do_not_see_is_named() -> None:
    with pytest.raises(ProblemError, match=r"changes by .* per unit of boost, .* by_values=\['boost'\]"):
        with_gradients(problem_of(Hidden), SPACE)
    assert with_gradients(problem_of(Hidden, by_values=["boost"]), SPACE) == {"decay"}


def test_workers_do_not_look_for_hidden_uses_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raybilevel._adapters.adapter.in_a_worker", lambda: True)
    problem, given = problem_of(Hidden), {**CONFIG, "boost": torch.tensor(2.0)}
    assert problem.lower_loss(model_of(problem), given, examples(0)) > 0
    monkeypatch.setattr("raybilevel._adapters.adapter.in_a_worker", lambda: False)
    with pytest.raises(ProblemError, match="hidden from gradients"):
        problem.lower_loss(model_of(problem), given, examples(0))


class Share(Softmax):
    """What is computed of a float in `__init__` keeps its gradient."""

    def __init__(self, lr: float, decay: float, smoothing: float, boost: float) -> None:
        super().__init__(lr, decay, smoothing, boost)
        self.rest = 1 - smoothing / 2

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return self.rest * cross_entropy(self.linear(x), y)


def test_arithmetic_before_the_loss_is_followed() -> None:
    problem = problem_of(Share)
    smoothing = torch.tensor(0.1, requires_grad=True)
    loss = problem.lower_loss(model_of(problem), {**CONFIG, "decay": 0.0, "smoothing": smoothing}, examples(0))
    (slope,) = torch.autograd.grad(loss, smoothing)
    assert slope.item() == pytest.approx(-math.log(CLASSES) / 2)


def logging_as(name: str, made: Any) -> type[Softmax]:
    class Logging(Softmax):
        def validation_step(self, batch: Any) -> None:
            x, y = batch
            self.log_dict({name: made(cross_entropy(self.linear(x), y)), "val_accuracy": 0.5})

    return Logging


@pytest.mark.parametrize(
    ("name", "made", "message"),
    [
        ("validation", lambda loss: loss, r"logs 'validation', 'val_accuracy', and the metric 'val_loss' was expected"),
        ("val_loss", lambda loss: loss.item(), r"logs 'val_loss' as float, which has no gradient"),
        ("val_loss", lambda loss: loss.detach(), r"logs 'val_loss' without a gradient; log the loss before"),
    ],
)
def test_a_metric_that_cannot_be_f_is_named(name: str, made: Any, message: str) -> None:
    with pytest.raises(ProblemError, match=message):
        with_gradients(problem_of(logging_as(name, made)), SPACE)


def test_losses_may_be_given() -> None:
    def upper(module: Any, batch: Any) -> Tensor:
        x, y = batch
        return cross_entropy(module.linear(x), y) * 2

    class Own(logging_as("validation", float)):  # type: ignore[misc]
        def my_loss(self, batch: Any) -> Tensor:
            x, y = batch
            return cross_entropy(self.linear(x), y) * self.hparams.boost

    problem = problem_of(Own, lower_loss="my_loss", upper_loss=upper)
    model, (x, y) = model_of(problem), examples(0)
    plain = cross_entropy(model.linear(x), y)
    torch.testing.assert_close(problem.upper_loss(model, CONFIG, (x, y)), 2 * plain)
    torch.testing.assert_close(problem.lower_loss(model, {**CONFIG, "boost": torch.tensor(3.0)}, (x, y)), 3 * plain)
    with pytest.raises(ProblemError, match="Own has no method 'lost'"):
        problem_of(Own, lower_loss="lost").lower_loss(model, CONFIG, (x, y))


def test_steps_without_a_loss_are_refused() -> None:
    class Nothing(Softmax):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            return None

    class Manual(Softmax):
        automatic_optimization = False

    for kind, message in ((Nothing, "must return the loss as a tensor"), (Manual, "takes the steps of the optimizer")):
        with pytest.raises(ProblemError, match=message):
            with_gradients(problem_of(kind), SPACE)


def test_the_loader_that_a_metric_names_is_the_upper_level() -> None:
    class Two(Data):
        def val_dataloader(self) -> Any:
            return [DataLoader(TensorDataset(*examples(seed)), 25) for seed in (1, 2)]

    class Both(Softmax):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
            x, y = batch
            self.log("val_loss", (1 + dataloader_idx) * cross_entropy(self.linear(x), y))

    problem = problem_of(Both, Two, metric="val_loss/dataloader_idx_1")
    (first, *_) = problem.batches("upper", None, CONFIG)
    assert torch.equal(first[0], examples(2)[0][:25])
    model = model_of(problem)
    assert problem.upper_loss(model, CONFIG, first).item() == pytest.approx(2 * math.log(CLASSES))
    assert ended(problem, CONFIG).losses()["val_loss/dataloader_idx_1"] > 0


def test_batches_come_in_order_and_whole() -> None:
    problem = problem_of()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one, two = (torch.cat([x for x, _ in problem.batches("lower", None, CONFIG)]) for _ in range(2))
    assert torch.equal(one, two) and torch.equal(one, examples(0)[0])
    assert torch.equal(before, torch.get_rng_state())


def test_a_training_ends_with_the_best_checkpoint_and_all_its_epochs(tmp_path: Path) -> None:
    class Worse(Softmax):
        """F rises from the second epoch on."""

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)["loss"]
            return loss if self.current_epoch < 2 or not self.training else -loss

    callback = lightning.callbacks.ModelCheckpoint(tmp_path, monitor="val_loss")
    settings = {**QUIET, "max_epochs": 4, "enable_checkpointing": True, "callbacks": [callback]}
    fit = problem_of(Worse, Data, settings).train_model(CONFIG)
    last = problem_of(Worse, Data, settings, best=False).train_model(CONFIG)
    assert fit.passes == last.passes == 4.0
    assert fit.share == 0.5 and last.share == 1.0
    assert fit.metrics["val_loss"] < last.metrics["val_loss"]
    problem = problem_of(Worse)
    assert callback.best_model_path == ""  # the user's own object was copied
    end = [
        torch.stack(
            [problem.upper_loss(one.model, CONFIG, b) * len(b[1]) for b in problem.batches("upper", None, CONFIG)]
        )
        for one in (fit, last)
    ]
    assert [sum(losses).item() / ROWS for losses in end] == pytest.approx(
        [fit.metrics["val_loss"], last.metrics["val_loss"]], rel=1e-5
    )


def test_a_trial_concludes_with_the_time_of_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    concluded: list[Any] = []
    monkeypatch.setattr(
        "raybilevel._adapters.adapter.conclude", lambda *given, **named: concluded.append((given, named))
    )
    problem = problem_of()
    problem(CONFIG)
    (((_, model, config), named),) = concluded
    assert config == CONFIG and named["passes"] == 3.0 and named["metrics"]["val_loss"] > 0
    # Two steps an epoch, of rate 0.5 and momentum 0.8.
    assert named["trained_time"].keys() == dict(model.named_parameters()).keys()
    assert {round(time.item(), 4) for time in named["trained_time"].values()} == {3 * 2 * 0.5 / 0.2}


def test_factories_and_pairs_of_packages() -> None:
    def trainer(epochs: int) -> Any:
        return lightning.Trainer(**{**QUIET, "max_epochs": epochs})

    problem = problem_of(trainer=trainer)
    assert problem.train_model({**CONFIG, "epochs": 2}).passes == 2.0
    with pytest.raises(ConfigError, match="module: Softmax has the parameters smoothing, boost without a default"):
        problem_of().train_model({"lr": 0.1, "decay": 0.1})
    with pytest.raises(ConfigError, match="module must make a LightningModule, got Linear"):
        problem_of(lambda config: nn.Linear(2, 2)).train_model(CONFIG)
    with pytest.raises(ConfigError, match="data must be a class or a function of the config, got Data"):
        problem_of(data=Data())
    with pytest.raises(ConfigError, match="without a trainer there is nothing to train with"):
        problem_of(trainer=None).train_model(CONFIG)


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(ConfigError, match=r"from_lightning needs: pip install 'raybilevel\[lightning\]'"):
        problem_of()
