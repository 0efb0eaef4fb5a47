"""Checkpoints that are written can be read: NumPy's numbers are converted, what cannot be read is named at once."""

from __future__ import annotations

import builtins
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from raybilevel._lower import checkpoint
from raybilevel._lower.training import load_checkpoint, train
from raybilevel.errors import CheckpointError, ProblemError
from raybilevel.search import check_problem
from raybilevel.space import Parameter, Space
from tests.problems_for_tests import Network


def read_back(state: dict[str, Any]) -> dict[str, Any]:
    return checkpoint.load(checkpoint.dump({"format": 1, **state}), "test", 1)


@pytest.mark.parametrize(
    ("number", "plain"),
    [(np.float64(0.1), 0.1), (np.float32(0.5), 0.5), (np.int64(3), 3), (np.bool_(True), True), (np.str_("a"), "a")],
)
def test_numbers_of_numpy_become_pythons(number: Any, plain: Any):
    read = read_back({"lr": number, "nested": [{"a": (number, 1)}], "of": {np.int64(7): number}})
    assert read == {"format": 1, "lr": plain, "nested": [{"a": (plain, 1)}], "of": {7: plain}}
    assert type(read["lr"]) is type(plain)


def test_a_state_without_them_is_the_same_object():
    state = OrderedDict(a=[torch.ones(2), (1, 2.0)], b={"c": None})
    assert checkpoint.without_numpy(state) is state


@pytest.mark.parametrize("entry", [np.ones(3), nn.Linear(1, 1), breakpoint, lambda epoch: 0.1])
def test_what_cannot_be_read_is_named_when_it_is_written(entry: Any):
    with pytest.raises(CheckpointError, match=rf"optimizer/groups/0/lr is a {type(entry).__name__} \("):
        read_back({"optimizer": {"groups": [{"lr": entry}]}})


def test_a_function_that_was_replaced_is_named_too(monkeypatch: pytest.MonkeyPatch):
    replaced = breakpoint  # Ray replaces `print` in this way, for its progress bars, so here it may be Ray's already
    monkeypatch.setattr(builtins, "breakpoint", lambda *args: None)
    with pytest.raises(CheckpointError, match=r"a is a builtin_function_or_method \("):
        read_back({"a": replaced})


class Rated(Network):
    def __init__(self, rate: Any, **others: Any) -> None:
        super().__init__()
        self.rate, self.others = rate, others

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD([{"params": list(model.parameters()), **self.others}], lr=self.rate)


def test_a_learning_rate_of_numpy_leaves_a_checkpoint_that_can_be_read():
    _, written = train(Rated(np.logspace(-3, -1, 5)[3]), {"decay": 0.1})
    (group,) = load_checkpoint(written)["optimizer"]["param_groups"]
    assert group["lr"] == pytest.approx(10**-1.5)


def test_a_state_that_cannot_be_read_is_refused_before_anything_is_trained():
    space = Space((Parameter(("decay",), 1e-4, 1.0, log=True),))
    check_problem(Rated(np.float32(0.1)), space)
    with pytest.raises(ProblemError, match=r"optimizer/param_groups/0/milestones is a ndarray"):
        check_problem(Rated(0.1, milestones=np.arange(3)), space)
