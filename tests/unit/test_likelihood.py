from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from raybilevel._lower.likelihood import kind_of, upper_likelihood
from raybilevel.errors import ProblemError
from tests.tiny_problems import Means, Parabola

X = torch.tensor([[1.0, 2.0], [0.5, -1.0], [0.0, 0.3]], requires_grad=True)
CLASSES = torch.tensor([0, 1, 1])
YES = torch.tensor([0.0, 1.0, 1.0])


@pytest.mark.parametrize(
    ("loss", "kind"),
    [
        (lambda: functional.cross_entropy(X, CLASSES), "log_likelihood"),
        (lambda: functional.nll_loss(X.log_softmax(1), CLASSES), "log_likelihood"),
        (lambda: functional.binary_cross_entropy_with_logits(X[:, 0], YES), "log_likelihood"),
        (lambda: functional.binary_cross_entropy(X[:, 0].sigmoid(), YES), "log_likelihood"),
        (lambda: functional.mse_loss(X[:, 0], YES), "squared_error"),
        (lambda: functional.cross_entropy(X, CLASSES, reduction="sum"), None),
        (lambda: functional.cross_entropy(X, CLASSES, weight=torch.tensor([1.0, 2.0])), None),
        (lambda: functional.cross_entropy(X, CLASSES, label_smoothing=0.1), None),
        (lambda: functional.cross_entropy(X, CLASSES) + X.square().sum(), None),
        (lambda: functional.mse_loss(X, torch.zeros(3, 2)), None),  # two errors an example
        (lambda: functional.l1_loss(X[:, 0], YES), None),
        (lambda: X.square().mean(), None),
        (lambda: torch.tensor(1.0), None),
    ],
)
def test_a_loss_is_known_by_the_function_that_made_it(loss: Callable[[], Tensor], kind: str | None) -> None:
    assert kind_of(loss(), 3) == kind


def test_a_problem_is_asked_once() -> None:
    problem = Means((0.1, 0.2), examples=30)
    found = upper_likelihood(problem, {})
    assert (found.kind, found.examples) == ("log_likelihood", 30)
    problem.upper_likelihood = "squared_error"
    assert upper_likelihood(problem, {}) is found


def test_a_problem_may_be_a_data_class() -> None:
    @dataclass
    class Declared(Means):
        truth: tuple[float, ...] = (0.1,)  # type: ignore[assignment]

        def __post_init__(self) -> None:
            super().__init__(self.truth, examples=30)

    assert upper_likelihood(Declared(), {}).examples == 30


def test_what_a_problem_says_comes_first() -> None:
    class Errors(Parabola):
        upper_likelihood = "squared_error"

    assert upper_likelihood(Errors(), {}).kind == "squared_error"
    assert upper_likelihood(Parabola(), {"x": {"a": torch.tensor(0.1)}}).kind is None


def test_weights_that_have_seen_the_examples_make_f_no_likelihood() -> None:
    problem = Means((0.1, 0.2))
    problem.optimistic = True
    assert upper_likelihood(problem, {}).kind is None


def test_an_unknown_kind_is_refused() -> None:
    problem = Means((0.1, 0.2))
    problem.upper_likelihood = "gaussian"  # type: ignore[assignment]
    with pytest.raises(ProblemError, match=r"Means.upper_likelihood must be one of auto, .* got 'gaussian'"):
        upper_likelihood(problem, {})
