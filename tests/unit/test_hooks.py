"""The hooks of the loop, against loops written by hand, bit for bit, and across a checkpoint."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, ReduceLROnPlateau, StepLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from raybilevel._lower.precision import Narrowest
from raybilevel._lower.training import LowerLevelTraining, dump_checkpoint, load_checkpoint, refit, train
from raybilevel.errors import ProblemError
from raybilevel.problem import BilevelProblem, Hyperparameters, Level, minibatches
from raybilevel.tune._data_parallel import data_parallel_trainable
from raybilevel.tune._descent_trainable import hypergradient_trainable

SEED, CONFIG, ROWS, SIZE = 3, {"decay": 0.01}, 24, 6


class Noisy(BilevelProblem):
    """A network with batch normalisation on few noisy examples: F falls, and then rises."""

    epochs = 12

    def __init__(self, **settings: Any) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(2 * ROWS, 4, generator=generator)
        self.y = (self.x[:, 0] + 2 * torch.randn(2 * ROWS, generator=generator) > 0).long()
        vars(self).update(settings)

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))

    def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Any) -> Tensor:
        return self.upper_loss(model, batch) + hyperparameters["decay"] * model[0].weight.square().sum()

    def upper_loss(self, model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    def batches(self, level: Level, generator: torch.Generator | None) -> Iterable[Any]:
        rows = slice(ROWS) if level == "lower" else slice(ROWS, None)
        return minibatches((self.x[rows], self.y[rows]), SIZE, generator)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {"first": float(model[0].weight.detach()[0, 0])}

    def refit_batches(self, generator: torch.Generator | None) -> Iterable[Any]:
        return minibatches((self.x, self.y), SIZE, generator)


class Stepped(Noisy):
    def schedule(self, optimizer: torch.optim.Optimizer) -> LRScheduler:
        return StepLR(optimizer, 4, 0.3)


class Annealed(Noisy):
    schedule_interval = "step"

    def schedule(self, optimizer: torch.optim.Optimizer, hyperparameters: Hyperparameters) -> LRScheduler:
        return CosineAnnealingLR(optimizer, int(self.epochs * ROWS / SIZE), hyperparameters["decay"])


class Plateau(Noisy):
    def schedule(self, optimizer: torch.optim.Optimizer) -> LRScheduler:
        return ReduceLROnPlateau(optimizer, patience=0)


def begun(problem: Noisy) -> tuple[nn.Module, torch.optim.Optimizer, torch.Generator]:
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        model = problem.model()
    return model, problem.optimizer(model), torch.Generator().manual_seed(SEED)


def loss_of(problem: Noisy, model: nn.Module, batch: Any) -> Tensor:
    return problem.lower_loss(model, {"decay": torch.tensor(CONFIG["decay"])}, batch)


def upper_of(problem: Noisy, model: nn.Module) -> float:
    model.eval()
    with torch.no_grad():
        losses = [problem.upper_loss(model, batch) for batch in problem.batches("upper", None)]
    return sum(loss.item() for loss in losses) / len(losses)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def trained(problem: Noisy) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = load_checkpoint(train(problem, CONFIG, SEED)[1])["model"]
    return weights


@pytest.mark.parametrize("kind", [Stepped, Annealed])
def test_a_schedule_by_epoch_and_by_step(kind: type[Noisy]) -> None:
    problem = kind()
    model, optimizer, generator = begun(problem)
    by_step = kind is Annealed
    schedule = CosineAnnealingLR(optimizer, 48, CONFIG["decay"]) if by_step else StepLR(optimizer, 4, 0.3)
    for _ in range(problem.epochs):
        for batch in problem.batches("lower", generator):
            optimizer.zero_grad()
            loss_of(problem, model, batch).backward()
            optimizer.step()
            if by_step:
                schedule.step()
        if not by_step:
            schedule.step()
    assert same(trained(problem), model.state_dict())
    assert not same(trained(Noisy()), model.state_dict())


def test_a_schedule_that_waits_for_a_plateau_gets_the_upper_level() -> None:
    problem = Plateau()
    model, optimizer, generator = begun(problem)
    schedule = ReduceLROnPlateau(optimizer, patience=0)
    for _ in range(problem.epochs):
        model.train()
        for batch in problem.batches("lower", generator):
            optimizer.zero_grad()
            loss_of(problem, model, batch).backward()
            optimizer.step()
        schedule.step(upper_of(problem, model))
    assert optimizer.param_groups[0]["lr"] < 0.3
    assert same(trained(problem), model.state_dict())


def test_clipped_gradients() -> None:
    problem = Noisy(clip=0.1)
    model, optimizer, generator = begun(problem)
    for _ in range(problem.epochs):
        for batch in problem.batches("lower", generator):
            optimizer.zero_grad()
            loss_of(problem, model, batch).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
    assert same(trained(problem), model.state_dict())


class Large(Noisy):
    """Its gradients overflow float16 at the first scales that torch tries."""

    def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Any) -> Tensor:
        return 50 * super().lower_loss(model, hyperparameters, batch)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.006, momentum=0.9)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_autocast(kind: torch.dtype) -> None:
    problem = Large(autocast=kind, clip=20.0, accumulate=2)
    model, optimizer, generator = begun(problem)
    scaler, skipped = torch.amp.GradScaler("cpu", enabled=kind is torch.float16), 0
    for _ in range(problem.epochs):
        batches = iter(problem.batches("lower", generator))
        for pair in zip(batches, batches, strict=True):
            optimizer.zero_grad()
            for batch in pair:
                with torch.autocast("cpu", kind):
                    loss = loss_of(problem, model, batch) / 2
                scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 20.0)
            before = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            skipped += scaler.get_scale() < before
    training = LowerLevelTraining(problem, CONFIG, SEED)
    training.run()
    assert same(training.model.state_dict(), model.state_dict())
    assert (skipped > 0) == (kind is torch.float16)
    assert not same(trained(Large(clip=20.0, accumulate=2)), model.state_dict())
    # The losses that are reported are those of float32.
    assert training.upper() == pytest.approx(upper_of(problem, model), rel=1e-6)
    with Narrowest(torch.float32) as computed:
        training.levels.lower(training.variables.x, training.levels.y)
    assert computed.dtype == torch.float32
    if skipped:  # such a step moves no weights
        unclipped = Large(autocast=kind, accumulate=2)
        found = LowerLevelTraining(unclipped, CONFIG, SEED)
        found.run()
        steps = problem.epochs * ROWS / SIZE / 2
        assert found.hooks.time.state_dict()["0.weight"].item() == pytest.approx(0.06 * (steps - skipped), rel=1e-3)


def test_what_autocast_cannot_do_with_is_said() -> None:
    class Minimised(Noisy):
        def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
            return torch.optim.LBFGS(model.parameters())

    with pytest.raises(ProblemError, match="float16 scales gradients, which L-BFGS cannot do with"):
        LowerLevelTraining(Minimised(autocast=torch.float16), CONFIG)
    with pytest.raises(
        ProblemError, match=r"autocast needs weights in torch\.float32, and Noisy\.dtype is torch\.float64"
    ):
        LowerLevelTraining(Noisy(autocast=torch.bfloat16, dtype=torch.double), CONFIG)


def test_accumulated_gradients_and_what_they_cost() -> None:
    problem = Noisy(accumulate=2)
    model, optimizer, generator = begun(problem)
    for _ in range(problem.epochs):
        batches = list(problem.batches("lower", generator))
        for pair in (batches[:2], batches[2:]):
            optimizer.zero_grad()
            for batch in pair:
                (loss_of(problem, model, batch) / 2).backward()
            optimizer.step()
    assert same(trained(problem), model.state_dict())
    assert train(problem, CONFIG)[0].passes == problem.epochs + 1


def test_fewer_batches_at_the_end_are_weighted_by_their_examples() -> None:
    # 24 rows in batches of 6, three to a step: the gradient of a step is that of 18 rows, and then of 6
    class Whole(Noisy):
        def model(self) -> nn.Module:
            return nn.Sequential(nn.Linear(4, 2))

    class Uneven(Whole):
        def batches(self, level: Level, generator: torch.Generator | None) -> Iterable[Any]:
            ((x, y),) = minibatches((self.x[:ROWS], self.y[:ROWS]), None, None)
            return [(x[rows], y[rows]) for rows in (slice(0, 10), slice(10, None))]

    parts, whole = Uneven(accumulate=2, dtype=torch.double), Uneven(dtype=torch.double)
    whole.batches = lambda level, generator: [(whole.x[:ROWS], whole.y[:ROWS])]  # type: ignore[method-assign]
    expected, found = trained(whole), trained(parts)
    for name in expected:  # sums in another order, and a momentum that makes little of that
        assert torch.allclose(found[name], expected[name], rtol=1e-10)


def test_averaged_weights_are_evaluated_differentiated_and_kept() -> None:
    problem = Noisy(ema=0.8)
    model, optimizer, generator = begun(problem)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8))
    for _ in range(problem.epochs):
        for batch in problem.batches("lower", generator):
            optimizer.zero_grad()
            loss_of(problem, model, batch).backward()
            optimizer.step()
            averaged.update_parameters(model)
    found, checkpoint = train(problem, CONFIG, SEED)
    assert same(load_checkpoint(checkpoint)["model"], averaged.module.state_dict())
    assert not same(averaged.module.state_dict(), model.state_dict())
    assert found.metrics == problem.evaluate(averaged.module)
    assert found.upper_loss == pytest.approx(upper_of(problem, averaged.module), rel=1e-6)
    squared = averaged.module[0].weight.square().sum().item()  # df/d decay
    assert found.lower_gradient["decay"] == pytest.approx(squared, rel=1e-6)


@pytest.mark.parametrize("ema", [None, 0.8])
def test_early_stopping_ends_with_the_best_weights(ema: float | None) -> None:
    problem = Noisy(patience=3, epochs=40, ema=ema)
    free, best, waited = LowerLevelTraining(Noisy(epochs=40, ema=ema), CONFIG, SEED), (math.inf, {}), 0
    while waited < 3 and free.epoch < 40:
        free.run_epoch()
        upper = free.upper()
        waited = 0 if upper < best[0] else waited + 1
        best = min(best, (upper, copy.deepcopy(free.hooks.model.state_dict())), key=lambda pair: pair[0])
    training = LowerLevelTraining(problem, CONFIG, SEED)
    training.run()
    assert training.finished and training.reports and training.epoch == free.epoch < 40
    assert training.upper() == best[0] and same(training.state_dict()["model"], best[1])


def test_a_training_that_is_not_stopped_early_has_the_best_weights_too() -> None:
    problem = Noisy(patience=100, epochs=12)
    free, lowest = LowerLevelTraining(Noisy(epochs=12), CONFIG, SEED), math.inf
    while not free.finished:
        free.run_epoch()
        lowest = min(lowest, free.upper())
    assert train(problem, CONFIG, SEED)[0].upper_loss == lowest < free.upper()


def test_a_refit_is_not_stopped_by_data_that_it_is_trained_on() -> None:
    assert refit(Noisy(patience=1), CONFIG, SEED) == refit(Noisy(), CONFIG, SEED)


@pytest.mark.parametrize("stop", [1, 5])
@pytest.mark.parametrize("kind", [Stepped, Annealed, Plateau, Large])
def test_a_resumed_training_is_bitwise_the_uninterrupted_one(kind: type[Noisy], stop: int) -> None:
    settings: dict[str, Any] = {"clip": 0.5, "accumulate": 2, "ema": 0.8, "patience": 4}
    if kind is Large:  # whose scale is not what it was at first
        settings |= {"autocast": torch.float16, "patience": None}
    whole, stopped, resumed = (LowerLevelTraining(kind(**settings), CONFIG, SEED) for _ in range(3))
    whole.run()
    for _ in range(stop):
        stopped.run_epoch()
    resumed.load_state_dict(load_checkpoint(dump_checkpoint(stopped)))
    resumed.run()
    assert resumed.epoch == whole.epoch > stop
    assert same(resumed.state_dict()["model"], whole.state_dict()["model"])
    assert same(resumed.model.state_dict(), whole.model.state_dict())
    again = LowerLevelTraining(kind(**settings), CONFIG, SEED)
    again.load_state_dict(load_checkpoint(dump_checkpoint(whole)))
    assert again.finished and again.losses() == whole.losses()


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("accumulate", 0),
        ("patience", 1.5),
        ("clip", 0.0),
        ("ema", 1.0),
        ("schedule_interval", "batch"),
        ("autocast", True),
    ],
)
def test_a_setting_out_of_range_is_an_error(setting: str, value: Any) -> None:
    with pytest.raises(ProblemError, match=rf"Noisy\.{setting} must be .*, got {value!r}"):
        LowerLevelTraining(Noisy(**{setting: value}), CONFIG)


def test_a_training_of_another_kind_refuses_hooks_that_it_lacks() -> None:
    with pytest.raises(ProblemError, match=r"Noisy\.ema: data_parallel_trainable does not have it"):
        data_parallel_trainable(Noisy(ema=0.9), scaling=None)  # type: ignore[arg-type]
    with pytest.raises(ProblemError, match=r"Stepped\.schedule: hypergradient_trainable does not have it"):
        hypergradient_trainable(Stepped())
