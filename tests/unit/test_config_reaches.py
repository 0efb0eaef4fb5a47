"""The trial's config reaches the model, the optimizer and the batches: of a training, and of a step at its weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raybilevel._lower.training import LowerLevelTraining, load_checkpoint, refit, train
from raybilevel.errors import ProblemError
from raybilevel.methods import Default, Paper
from raybilevel.methods._base import UpperStep
from raybilevel.problem import BilevelProblem, Hyperparameters, Level, minibatches
from raybilevel.search import BilevelOptimizer, check_problem, observe, search
from raybilevel.search_state import Proposal, SearchState, Training
from raybilevel.space import Parameter, Space
from tests.problems_for_tests import Network

CONSTANTS = {"width": 5, "activation": "tanh", "batch": 6}
SPACE = Space((Parameter(("decay",), 1e-4, 1.0, log=True),))


class Shaped(BilevelProblem):
    """Width, activation, learning rate and batch size come from the config."""

    epochs = 24  # long enough for hypergradients to pay
    dtype = torch.double

    def __init__(self) -> None:
        self.x = torch.linspace(-1, 1, 24, dtype=torch.double)[:, None]
        self.sizes: list[tuple[Level, int]] = []

    def model(self, hyperparameters: Hyperparameters) -> nn.Module:
        activation = {"tanh": nn.Tanh, "relu": nn.ReLU}[hyperparameters["activation"]]
        width = hyperparameters["width"]
        return nn.Sequential(nn.Linear(1, width), activation(), nn.Linear(width, 1))

    def optimizer(self, model: nn.Module, hyperparameters: Hyperparameters) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=hyperparameters.get("lr", 0.1))

    def batches(
        self, level: Level, generator: torch.Generator | None, hyperparameters: Hyperparameters
    ) -> Iterable[Any]:
        data = self.x[::2] if level == "lower" else self.x[1::2]
        for (batch,) in minibatches((data,), hyperparameters["batch"], generator):
            self.sizes.append((level, len(batch)))
            yield batch

    def refit_batches(self, generator: torch.Generator | None, hyperparameters: Hyperparameters) -> Iterable[Any]:
        return [self.x] * hyperparameters["batch"]

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {"first": float(model.get_parameter("0.weight")[0])}

    def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Tensor) -> Tensor:
        return self.upper_loss(model, batch) + hyperparameters["decay"] * model.get_parameter("0.weight").square().sum()

    def upper_loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        return (model(batch) - torch.sin(3 * batch)).square().mean()


def test_a_training_is_made_of_its_config() -> None:
    problem = Shaped()
    training = LowerLevelTraining(problem, {**CONSTANTS, "decay": 0.1, "lr": 0.5})
    training.run_epoch()
    assert training.model.get_parameter("0.weight").shape == (5, 1)
    assert training.optimizer.param_groups[0]["lr"] == 0.5
    assert problem.sizes == [("lower", 6)] * 2
    other = LowerLevelTraining(problem, {**CONSTANTS, "decay": 0.1, "lr": 0.5, "activation": "relu"})
    assert isinstance(other.model.get_submodule("1"), nn.ReLU)


def test_a_refit_is_made_of_its_config() -> None:
    fewer, more = (refit(Shaped(), {**CONSTANTS, "decay": 0.1, "batch": batch}) for batch in (1, 2))
    assert fewer is not None and fewer != more


@pytest.mark.parametrize("method", [Default(), Paper(steps=3, iterations=1)], ids=["default", "paper"])
def test_a_step_rebuilds_the_model_of_its_training(method: Any) -> None:
    problem, unit = Shaped(), torch.tensor([0.5], dtype=torch.double)
    trained, checkpoint = train(problem, {**CONSTANTS, **SPACE.to_config(unit)})
    seen = observe(SPACE, SPACE.to_config(unit), trained)
    training = Training(
        0, Proposal((0.5,), "start"), "done", 0, seen.lower_loss, seen.upper_loss, seen.lower_gradient, seen.passes
    )
    state = SearchState((training,))
    problem.sizes.clear()
    step = UpperStep(0, "region", 0, state, 0, targets=(0,))
    result = method.run(problem, SPACE, CONSTANTS, step, lambda index: load_checkpoint(checkpoint))
    assert result.record.passes > 0
    assert {size for _, size in problem.sizes} == {6}


def test_a_search_runs_with_them() -> None:
    check_problem(Shaped(), SPACE, CONSTANTS)
    optimizer = BilevelOptimizer(SPACE, Default(start_points=2))
    search(Shaped(), optimizer, 4, CONSTANTS)
    assert any(training.hypergradient for training in optimizer.state.trainings)


def test_what_only_the_optimizer_reads_is_searched_by_values() -> None:
    space = Space((*SPACE.parameters, Parameter(("lr",), 1e-3, 0.3, log=True)))
    assert check_problem(Shaped(), space, CONSTANTS).smooth == (True, False)


def test_what_nothing_reads_may_be_read_by_a_loop_of_ones_own() -> None:
    problem, space = Shaped(), Space((*SPACE.parameters, Parameter(("mixup",), 0.0, 1.0)))
    with pytest.raises(ProblemError, match="mixup: nothing in Shaped reads it"):
        check_problem(problem, space, CONSTANTS)
    problem.own_loop = True
    assert check_problem(problem, space, CONSTANTS).smooth == (True, False)


def test_what_only_the_schedule_reads_is_read_and_hooks_are_checked_before_a_training() -> None:
    class Scheduled(Shaped):
        def schedule(self, optimizer: torch.optim.Optimizer, hyperparameters: Hyperparameters) -> Any:
            return torch.optim.lr_scheduler.StepLR(optimizer, 1, hyperparameters["factor"])

    problem, space = Scheduled(), Space((*SPACE.parameters, Parameter(("factor",), 0.1, 1.0)))
    assert check_problem(problem, space, CONSTANTS).smooth == (True, False)
    problem.ema = 2.0
    with pytest.raises(ProblemError, match=r"Scheduled\.ema must be a decay between 0 and 1"):
        check_problem(problem, space, CONSTANTS)


class Shared(Network):
    """The decay of the loss is read by another part, too, as a plain value. part: by which."""

    def __init__(self, part: str) -> None:
        super().__init__()
        self.part = part

    def model(self, hyperparameters: Any) -> nn.Module:  # type: ignore[override]
        model = super().model()
        share = hyperparameters["decay"] if self.part == "model" else 0.5
        model.register_buffer("share", torch.tensor(share))
        return model

    def optimizer(self, model: nn.Module, hyperparameters: Any) -> torch.optim.Optimizer:  # type: ignore[override]
        rates = dict(hyperparameters)
        return torch.optim.SGD(model.parameters(), lr=rates["decay"] if self.part == "optimizer" else 0.1)

    def batches(self, level: Level, generator: torch.Generator | None, hyperparameters: Any) -> Any:  # type: ignore[override]
        scale = hyperparameters["decay"] if self.part == "batches" else 1.0
        return [(scale * x, y) for x, y in super().batches(level, generator)]

    def upper_loss(self, model: Any, batch: Any) -> Tensor:
        return model.share * super().upper_loss(model, batch)


@pytest.mark.parametrize("part", ["model", "optimizer", "batches", "none"])
def test_what_acts_outside_of_the_losses_as_well_is_searched_by_values(part: str, caplog: pytest.LogCaptureFixture):
    """Reading alone, as all of a dict is read, does no harm."""
    assert check_problem(Shared(part), Space((Parameter(("decay",), 1e-3, 1.0, log=True),))).smooth == (part == "none",)
    assert ("depends on it as well" in caplog.text) == (part != "none")


def test_a_hyperparameter_of_the_upper_loss_alone_has_gradients():
    class Upper(Network):
        def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Any) -> Tensor:
            decay = sum(parameter.square().sum() for parameter in model.parameters())
            return super().upper_loss(model, batch) + hyperparameters["decay"] * decay

        def upper_loss(self, model: nn.Module, hyperparameters: Any, batch: Any) -> Tensor:  # type: ignore[override]
            return nn.functional.cross_entropy(model(batch[0]) / hyperparameters["temperature"], batch[1])

    space = Space((Parameter(("decay",), 1e-3, 1.0, log=True), Parameter(("temperature",), 0.5, 2.0)))
    assert check_problem(Upper(), space).smooth == (True, True)
