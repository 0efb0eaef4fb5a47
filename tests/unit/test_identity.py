"""Two problems are told apart by what they are made of, and one in two places is not."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from raybilevel._cluster.identity import identity_of, is_other
from tests.tiny_problems import Unlucky, parabola


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda: parabola(), lambda: Unlucky()),
        (lambda: parabola(target=1.0), lambda: parabola(target=2.0)),
        (lambda: parabola(epochs=3), lambda: parabola()),
        (lambda: parabola(data=torch.zeros(3)), lambda: parabola(data=torch.tensor([0.0, 0.0, 1.0]))),
        (lambda: parabola(data={"a": [np.zeros(2), "x"]}), lambda: parabola(data={"a": [np.zeros(2), "y"]})),
        (lambda: parabola(net=nn.Linear(2, 2)), lambda: parabola(net=nn.Linear(2, 2))),
    ],
)
def test_what_differs_is_another_problem(one: Callable[[], Any], other: Callable[[], Any]) -> None:
    assert is_other(identity_of(one()), identity_of(other()))


def test_equal_problems_are_one() -> None:
    torch.manual_seed(0)
    net = nn.Linear(2, 2)
    first, second = parabola(net=net, data=torch.ones(9), shift=len), parabola(shift=len, data=torch.ones(9), net=net)
    assert first.space is None  # a cached property is no part of it
    assert not is_other(identity_of(first), identity_of(second))
    assert not is_other(identity_of(first), identity_of(pickle.loads(pickle.dumps(first))))


def test_a_problem_that_changes_is_the_same_object_still() -> None:
    problem = parabola()
    before = identity_of(problem)
    problem.target = 5.0
    problem.itself = problem  # type: ignore[attr-defined]
    assert not is_other(before, identity_of(problem))
    assert is_other(before, identity_of(parabola(target=5.0)))
