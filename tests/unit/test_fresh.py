"""Each training begins anew: what keeps something of an earlier one is refused before the first."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from raybilevel.errors import ProblemError
from raybilevel.problem import Hyperparameters, Level
from raybilevel.search import check_problem
from raybilevel.space import Parameter, Space
from tests.problems_for_tests import Network

DECAY = Space((Parameter(("decay",), 1e-4, 1.0, log=True),))


class Kept(Network):
    """A network that is kept in the problem."""

    def __init__(self) -> None:
        super().__init__()
        self.net = super().model()

    def model(self) -> nn.Module:
        return self.net


class Copied(Kept):
    def model(self) -> nn.Module:
        return copy.deepcopy(self.net)


class HeadOnly(Kept):
    """A new body around a head that is kept."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4), self.net)


class Cached(Network):
    @staticmethod
    @cache
    def made() -> nn.Module:
        return nn.Linear(4, 2)

    def model(self) -> nn.Module:
        return self.made()


class Wrapped(Network):
    """Other parameters over the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.randn(2, 4)

    def model(self) -> nn.Module:
        model = nn.Linear(4, 2, bias=False)
        model.weight = nn.Parameter(self.weight)
        return model


@pytest.mark.parametrize("kind", [Kept, HeadOnly, Cached, Wrapped])
def test_a_model_of_an_earlier_training_is_refused(kind: type[Network]):
    with pytest.raises(ProblemError, match=r"model\(\) returned weights of an earlier model.*copy\.deepcopy"):
        check_problem(kind(), DECAY)


def test_a_copy_of_a_kept_model_is_a_model_of_its_own():
    check_problem(Copied(), DECAY)


class Frozen(Network):
    """A body that is kept, frozen, under a new head. norm: whose statistics change with each step in train mode."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6) if norm else nn.ReLU())
        self.body = body.requires_grad_(False)

    def model(self) -> nn.Module:
        return nn.Sequential(self.body, nn.Linear(6, 2))


def test_a_frozen_body_may_be_shared_unless_a_step_changes_it():
    check_problem(Frozen(norm=False), DECAY)
    with pytest.raises(ProblemError, match=r"shares 0\.1\.running_mean.* a step of training changes that"):
        check_problem(Frozen(norm=True), DECAY)


@pytest.mark.parametrize("draw", [lambda: np.random.default_rng().normal(), lambda: torch.Generator().seed()])
def test_weights_that_do_not_follow_the_seed_are_refused(draw: Any):
    class Own(Network):
        def model(self) -> nn.Module:
            model = nn.Linear(4, 2)
            nn.init.constant_(model.weight, float(draw()))
            return model

    with pytest.raises(ProblemError, match=r"is another one at each call under the same seed \(weight\)"):
        check_problem(Own(), DECAY)


class Optimizers(Network):
    """made: by the first call, given out again."""

    def __init__(self, again: bool) -> None:
        super().__init__()
        self.again = again
        self.made: torch.optim.Optimizer | None = None

    def optimizer(self, model: nn.Module) -> Any:
        if self.made is None:
            self.made = torch.optim.SGD(model.parameters(), lr=0.1)
        return self.made if self.again else ([self.made], [])


def test_an_optimizer_of_an_earlier_training_is_refused():
    with pytest.raises(
        ProblemError, match=r"optimizer\(model\): 6 of 6 parameters are not those of the model that it was given"
    ):
        check_problem(Optimizers(again=True), DECAY)


def test_an_optimizer_that_is_given_new_parameters_is_one_of_an_earlier_training():
    class Refilled(Network):
        def __init__(self) -> None:
            super().__init__()
            self.made = super().optimizer(super().model())

        def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
            self.made.param_groups[0]["params"] = list(model.parameters())
            return self.made

    with pytest.raises(ProblemError, match=r"Refilled\.optimizer\(model\) returned the optimizer of an earlier model"):
        check_problem(Refilled(), DECAY)


def test_what_is_no_optimizer_is_refused():
    with pytest.raises(ProblemError, match="optimizer must return a torch optimizer, got tuple"):
        check_problem(Optimizers(again=False), DECAY)


def test_lazy_layers_are_named():
    class Lazy(Network):
        def model(self) -> nn.Module:
            return nn.LazyLinear(2)

    with pytest.raises(ProblemError, match="has lazy layers; give them their sizes"):
        check_problem(Lazy(), DECAY)


def test_a_buffer_of_the_problem_may_be_shared():
    class Graph(Network):
        def __init__(self) -> None:
            super().__init__()
            self.adjacency: Tensor = torch.eye(4)

        def model(self) -> nn.Module:
            model = nn.Linear(4, 2)
            model.register_buffer("adjacency", self.adjacency)
            return model

    check_problem(Graph(), DECAY)


class Continued(Network):
    """Each model starts from the weights that the last training left, copied."""

    def __init__(self) -> None:
        super().__init__()
        self.last: dict[str, Tensor] = {}

    def model(self) -> nn.Module:
        model = nn.Linear(4, 2)
        model.load_state_dict(self.last or model.state_dict())
        return model

    def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Any) -> Tensor:
        if model.training:
            self.last = {key: value.clone() for key, value in model.state_dict().items()}
        return super().lower_loss(model, hyperparameters, batch)


class Centred(Network):
    """The loss has a running mean that the problem keeps."""

    centre = torch.zeros(())

    def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Any) -> Tensor:
        if model.training:
            self.centre = 0.9 * self.centre + 0.1 * batch[0].mean()
        return super().lower_loss(model, hyperparameters, (batch[0] - self.centre, batch[1]))


class InPlace(Network):
    """A step of training scales the data themselves."""

    def batches(self, level: Level, generator: torch.Generator | None) -> Iterable[Any]:
        return [(self.x, self.y)]

    def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Any) -> Tensor:
        if model.training:
            batch[0].mul_(0.9)
        return super().lower_loss(model, hyperparameters, batch)


def test_a_training_that_leaves_something_to_the_next_one_is_refused():
    with pytest.raises(ProblemError, match=r"model\(\) is another one after a step of training \(weight, bias\)"):
        check_problem(Continued(), DECAY)
    for kind in (Centred, InPlace):
        with pytest.raises(ProblemError, match=r"lower_loss is another one after a step of training.*keep nothing"):
            check_problem(kind(), DECAY)


def test_a_schedule_of_another_optimizer_is_refused():
    class Stale(Network):
        def __init__(self) -> None:
            super().__init__()
            self.kept = torch.optim.lr_scheduler.StepLR(super().optimizer(super().model()), 3)

        def schedule(self, optimizer: torch.optim.Optimizer) -> Any:
            return self.kept

    with pytest.raises(ProblemError, match=r"schedule\(optimizer\) returned a scheduler of another optimizer"):
        check_problem(Stale(), DECAY)


def test_a_scheduler_that_no_checkpoint_keeps_is_said(caplog: pytest.LogCaptureFixture):
    class Hooked(Network):
        def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
            optimizer = super().optimizer(model)
            scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)
            optimizer.register_step_post_hook(lambda *_: scheduler.step())
            return optimizer

    check_problem(Hooked(), DECAY)
    assert caplog.text.count("Hooked.optimizer makes a learning-rate scheduler, which starts again") == 1
    check_problem(Network(), DECAY)
    assert "Network.optimizer" not in caplog.text
