"""For how long weights were trained, by the optimizer's rates."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from raybilevel._lower.trained_time import LARGEST_RATIO, per_weight, rates
from raybilevel._lower.training import LowerLevelTraining, dump_checkpoint, load_checkpoint
from tests.problems_for_tests import Logistic, vector

UNIT = vector(0.4, 0.6, 0.5)
STEPS = 6
"""Of two epochs of three minibatches."""


def training(optimizer: Callable[[nn.Module], torch.optim.Optimizer], **settings: Any) -> LowerLevelTraining:
    problem = Logistic(rows=12, batch=4, epochs=2, optimizer=optimizer)
    for name, value in settings.items():
        setattr(problem, name, value)
    return LowerLevelTraining(problem, problem.space.to_config(UNIT))


def trained(optimizer: Callable[[nn.Module], torch.optim.Optimizer], **settings: Any) -> float:
    found = training(optimizer, **settings)
    found.run()
    return time_of(found).item()


def time_of(training: LowerLevelTraining) -> torch.Tensor:
    return training.hooks.time.state_dict()["weight"]


def sgd(**settings: float) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda model: torch.optim.SGD(model.parameters(), lr=0.1, **settings)


def test_gradient_descent_takes_its_rate() -> None:
    assert trained(sgd()) == pytest.approx(0.1 * STEPS)
    assert trained(sgd(momentum=0.9)) == pytest.approx(STEPS)
    assert trained(sgd(momentum=0.9, dampening=0.5)) == pytest.approx(STEPS / 2)
    assert trained(sgd(dampening=0.5)) == pytest.approx(0.1 * STEPS)  # of a momentum that is not there
    assert trained(sgd(), accumulate=3) == pytest.approx(0.1 * 2)


def test_a_rate_of_zero_takes_nothing_from_infinite_time() -> None:
    assert trained(lambda model: torch.optim.LBFGS(model.parameters(), lr=0.0)) == math.inf


def test_a_schedule_counts_with_the_rates_that_it_gave() -> None:
    def schedule(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    assert trained(sgd(), schedule=schedule) == pytest.approx(3 * 0.1 + 3 * 0.05)
    by_step = sum(0.1 * 0.5**step for step in range(STEPS))
    assert trained(sgd(), schedule=schedule, schedule_interval="step") == pytest.approx(by_step)


def test_clipped_gradients_take_less() -> None:
    assert 0 < trained(sgd(), clip=1e-3) < 0.1 * 0.1 * STEPS


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RMSprop])
def test_optimizers_that_divide_by_a_second_moment_do_not_depend_on_units_of_f(kind: Any) -> None:
    class Larger(Logistic):
        def lower_loss(self, *given: Any) -> torch.Tensor:
            return 100 * super().lower_loss(*given)

    plain, larger = Logistic(rows=12, batch=4), Larger(rows=12, batch=4)
    times = []
    for problem in (plain, larger):
        problem.epochs, problem.make_optimizer = 4, lambda model: kind(model.parameters(), lr=1e-4, eps=1e-15)
        found = LowerLevelTraining(problem, problem.space.to_config(UNIT))
        found.run()
        times.append(time_of(found))
    torch.testing.assert_close(times[0], 100 * times[1], rtol=1e-3, atol=0)


def test_adam_by_hand() -> None:
    # one step: the second moment, without its bias, is that gradient's square
    found = training(lambda model: torch.optim.Adam(model.parameters(), lr=0.01), accumulate=3)
    found.run_epoch()
    gradient = found.model.get_parameter("weight").grad
    assert gradient is not None
    torch.testing.assert_close(time_of(found), 0.01 / gradient.abs(), rtol=1e-6, atol=0)


def test_adadelta_moves_weights_as_far_as_its_rate_says() -> None:
    model = nn.Linear(1, 1, bias=False)
    adadelta = torch.optim.Adadelta(model.parameters(), lr=1.0)
    for _ in range(50):  # a constant gradient of 2
        adadelta.zero_grad()
        (2 * model.weight).sum().backward()
        before = model.weight.item()
        adadelta.step()
    (rate,) = rates(adadelta, adadelta.param_groups[0]).values()
    assert rate.item() * 2 == pytest.approx(before - model.weight.item(), rel=0.05)  # the mean follows the step


def test_weights_of_the_lowest_f_have_the_time_that_they_were_trained() -> None:
    class Rising(Logistic):
        """F rises from the second epoch on."""

        def lower_loss(self, model: nn.Module, hyperparameters: Any, batch: Any) -> torch.Tensor:
            return Logistic.upper_loss(self, model, batch)

        def upper_loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
            return (model.get_parameter("weight").norm() - self.at).abs()

    problem = Rising(rows=12, batch=4, epochs=9, optimizer=sgd())
    problem.at = 0.0
    alone = LowerLevelTraining(problem, problem.space.to_config(UNIT))
    for _ in range(2):
        alone.run_epoch()
    problem.at, problem.patience = alone.model.get_parameter("weight").norm().item(), 3
    found = LowerLevelTraining(problem, problem.space.to_config(UNIT))
    for _ in range(4):
        found.run_epoch()
    resumed = LowerLevelTraining(problem, problem.space.to_config(UNIT))
    resumed.load_state_dict(load_checkpoint(dump_checkpoint(found)))
    for one in (found, resumed):
        one.run()
        assert one.epoch == 5 and time_of(one).item() == pytest.approx(0.1 * 3 * 2)


def test_a_minimiser_takes_infinite_time() -> None:
    assert trained(lambda model: torch.optim.LBFGS(model.parameters())) == math.inf


@pytest.mark.parametrize("optimizer", [sgd(momentum=0.5), lambda model: torch.optim.Adam(model.parameters())])
def test_it_goes_on_from_a_checkpoint(optimizer: Callable[[nn.Module], torch.optim.Optimizer]) -> None:
    whole, first, second = (training(optimizer) for _ in range(3))
    whole.run()
    first.run_epoch()
    second.load_state_dict(load_checkpoint(dump_checkpoint(first)))
    second.run()
    assert torch.equal(time_of(second), time_of(whole)) and time_of(second).all()


def test_weights_without_gradients_take_no_endless_time() -> None:
    model = nn.Linear(2, 1, bias=False)
    adam = torch.optim.Adam(model.parameters())
    model(torch.tensor([[1.0, 0.0]])).sum().backward()
    adam.step()
    (rate,) = rates(adam, adam.param_groups[0]).values()
    assert rate[0].tolist() == pytest.approx([1, LARGEST_RATIO * math.sqrt(2)], rel=1e-5)


def test_times_of_tensors_are_those_of_their_weights() -> None:
    model = nn.Linear(2, 2)
    times = {"weight": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "bias": torch.tensor(5.0)}
    found = per_weight(times, model)
    assert found is not None and found.tolist() == [1, 2, 3, 4, 5, 5]
    model.bias.requires_grad_(False)
    found = per_weight(times, model)
    assert found is not None and found.tolist() == [1, 2, 3, 4]
    assert per_weight(None, model) is None


def test_weights_that_no_optimizer_has_were_not_trained() -> None:
    found = training(lambda model: torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1))
    found.run()
    assert time_of(found).item() == 0
