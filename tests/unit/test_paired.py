"""Gains with their standard errors, over single examples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from raybilevel._lower.paired import Gain, Weights, paired_gains, terms_of
from raybilevel.errors import ProblemError
from raybilevel.problem import BilevelProblem, Hyperparameters, Level

X = torch.tensor([[1.0, 2.0], [0.5, -1.0], [0.0, 0.3]], requires_grad=True)
CLASSES = torch.tensor([0, 1, 1])
YES = torch.tensor([0.0, 1.0, 1.0])


class Line(BilevelProblem):
    """y = w x. F is the mean squared error of five examples, in batches of two."""

    dtype = torch.double

    def __init__(self) -> None:
        self.x = torch.arange(1.0, 6.0, dtype=torch.double).unsqueeze(1)

    def model(self) -> nn.Module:
        return nn.Linear(1, 1, bias=False)

    def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Tensor) -> Tensor:
        return self.upper_loss(model, batch) + hyperparameters["decay"] * model.get_parameter("weight").square().sum()

    def upper_loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        return functional.mse_loss(model(batch), 2 * batch)

    def batches(self, level: Level, generator: torch.Generator | None) -> Iterator[Tensor]:
        yield from self.x.split(2)


class WithTestLosses(Line):
    def test_losses(self, model: nn.Module) -> Tensor:
        return model(self.x[:3]).flatten().abs()


def at(weight: float) -> Weights:
    return Weights({"decay": 0.1}, {"weight": torch.tensor([[weight]], dtype=torch.double)})


@pytest.mark.parametrize(
    ("loss", "terms"),
    [
        (lambda: functional.cross_entropy(X, CLASSES), lambda: functional.cross_entropy(X, CLASSES, reduction="none")),
        (lambda: functional.nll_loss(X.log_softmax(1), CLASSES), lambda: -X.log_softmax(1)[[0, 1, 2], CLASSES]),
        (
            lambda: functional.binary_cross_entropy_with_logits(X[:, 0], YES),
            lambda: functional.binary_cross_entropy_with_logits(X[:, 0], YES, reduction="none"),
        ),
        (
            lambda: functional.binary_cross_entropy(X[:, 0].sigmoid(), YES),
            lambda: functional.binary_cross_entropy(X[:, 0].sigmoid(), YES, reduction="none"),
        ),
        (lambda: functional.mse_loss(X[:, 0], YES), lambda: (X[:, 0] - YES).square()),
    ],
)
def test_terms_of_a_loss_are_those_without_the_mean(loss: Callable[[], Tensor], terms: Callable[[], Tensor]) -> None:
    found = terms_of(loss(), 3)
    assert found is not None
    torch.testing.assert_close(found, terms().detach().double(), rtol=1e-6, atol=1e-6)


def test_a_mean_that_leaves_examples_out_has_no_known_terms() -> None:
    assert terms_of(functional.cross_entropy(X, torch.tensor([0, 1, -100])), 3) is None
    assert terms_of(2 * functional.mse_loss(X[:, 0], YES), 3) is None


def test_without_losses_of_test_examples_the_gain_is_that_of_f() -> None:
    # The losses are (w - 2)^2 x^2, so the differences from w = 1 to w = 2 are x^2 = 1, 4, 9, 16, 25.
    found = paired_gains(Line(), {7: at(1.0)}, at(2.0))[7]
    assert found is not None
    assert (found.of, found.mean, found.examples) == ("upper_loss", pytest.approx(11.0), 5)
    assert found.standard_error == pytest.approx(math.sqrt(374 / 4) / math.sqrt(5))


def test_losses_of_test_examples_come_first_and_a_loss_is_a_negative_gain() -> None:
    # |w| x for x = 1, 2, 3: it rises by 1, 2, 3 from w = 1 to w = 2.
    found = paired_gains(WithTestLosses(), {0: at(1.0), 4: at(2.0)}, at(2.0))
    assert found == {
        0: Gain("test_loss", -2.0, pytest.approx(1 / math.sqrt(3)), 3),
        4: Gain("test_loss", 0.0, 0.0, 3),
    }


def test_a_loss_that_is_no_plain_mean_has_no_gain() -> None:
    class Sum(Line):
        def upper_loss(self, model: nn.Module, batch: Tensor) -> Tensor:
            return (model(batch) - 2 * batch).square().mean()

    class Repeated(Line):
        upper_repeats = 2.0

    class Noisy(Line):
        def upper_loss(self, model: nn.Module, batch: Tensor) -> Tensor:
            return functional.mse_loss(model(batch + torch.randn_like(batch)), 2 * batch)

    for kind in (Sum, Repeated, Noisy):
        assert paired_gains(kind(), {0: at(1.0)}, at(2.0)) == {0: None}


@pytest.mark.parametrize(
    ("losses", "got"), [(torch.zeros(()), r"one of shape \(\)"), ([1.0], "list")], ids=["number", "list"]
)
def test_losses_of_another_shape_are_refused(losses: Any, got: str) -> None:
    class Wrong(Line):
        def test_losses(self, model: nn.Module, hyperparameters: Hyperparameters) -> Any:
            return losses

    with pytest.raises(ProblemError, match=rf"Wrong.test_losses must return a tensor of shape \(n,\), got {got}"):
        paired_gains(Wrong(), {0: at(1.0)}, at(2.0))
