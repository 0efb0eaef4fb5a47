from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from raybilevel.problem import BilevelProblem, leaves, minibatches, move
from tests.problems_for_tests import Ridge


class Pair(NamedTuple):
    x: Tensor
    labels: Tensor


BATCH = {"pair": Pair(torch.zeros(3, 2), torch.arange(3)), "list": [torch.ones(3), "name"], "tuple": (1.5,)}


def test_the_interface_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        BilevelProblem()


def test_leaves_are_the_tensors_in_order():
    assert [leaf.shape for leaf in leaves(BATCH)] == [(3, 2), (3,), (3,)]


def test_move_casts_floating_tensors_and_keeps_the_rest():
    moved = move(BATCH, "cpu", torch.double)
    assert moved["pair"].x.dtype == torch.double
    assert moved["pair"].labels.dtype == torch.long
    assert isinstance(moved["pair"], Pair)
    assert moved["list"][0].dtype == torch.double and moved["list"][1] == "name"
    assert moved["tuple"] == (1.5,)


@pytest.mark.parametrize(
    ("batch", "size"),
    [(BATCH, 3), ((torch.zeros(5, 2), torch.zeros(7)), 5), ([torch.tensor(1.0)], 1), ("nothing", 1)],
)
def test_the_size_of_a_batch_is_the_length_of_its_first_tensor(batch: object, size: int):
    assert Ridge().batch_size(batch) == size


def test_minibatches_without_a_generator_keep_the_order():
    rows = torch.arange(7)
    assert [batch[0].tolist() for batch in minibatches((rows,), 3, None)] == [[0, 1, 2], [3, 4, 5], [6]]


@pytest.mark.parametrize("size", [None, 7, 100])
def test_one_batch_of_all_rows(size: int | None):
    rows = torch.arange(7)
    (batch,) = minibatches((rows, rows), size, torch.Generator().manual_seed(0))
    assert torch.equal(batch[0], rows)


def test_minibatches_shuffle_rows_together():
    rows, generator = torch.arange(7), torch.Generator().manual_seed(0)
    passes = [list(minibatches((rows, 10 * rows), 3, generator)) for _ in range(2)]
    orders = [torch.cat([batch[0] for batch in batches]) for batches in passes]
    assert all(torch.equal(order.sort().values, rows) for order in orders)
    assert not torch.equal(orders[0], orders[1])
    assert all(torch.equal(second, 10 * first) for batches in passes for first, second in batches)


def test_the_defaults_of_a_problem():
    problem = Ridge()
    assert BilevelProblem.epochs == 50 and BilevelProblem.dtype == torch.float32
    assert problem.evaluate(problem.model()) == {}
    assert problem.refit_batches(None) is None
    assert isinstance(BilevelProblem.optimizer(problem, problem.model()), torch.optim.SGD)
