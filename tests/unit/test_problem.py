from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from raybilevel.errors import ProblemError
from raybilevel.problem import (
    BilevelProblem,
    Hyperparameters,
    LargeUpperLevel,
    Level,
    SupportsLowerMap,
    SupportsShards,
    evaluate,
    leaves,
    make_batches,
    make_model,
    make_optimizer,
    make_refit_batches,
    minibatches,
    move,
    upper_loss,
)
from tests.problems_for_tests import Ridge


class Pair(NamedTuple):
    x: Tensor
    labels: Tensor


BATCH = {"pair": Pair(torch.zeros(3, 2), torch.arange(3)), "list": [torch.ones(3), "name"], "tuple": (1.5,)}


def test_the_interface_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        BilevelProblem()


def test_either_form_of_the_upper_level_is_called() -> None:
    class Direct(Ridge):
        def upper_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Any) -> Tensor:
            return super().upper_loss(model, batch) + hyperparameters["x"]

        def evaluate(self, model: nn.Module, hyperparameters: Hyperparameters) -> dict[str, Any]:
            return {"x": hyperparameters["x"]}

    class WithAnOption(Ridge):
        def upper_loss(self, model: nn.Module, batch: Any, factor: float = 2.0) -> Tensor:
            return factor * super().upper_loss(model, batch)

        def evaluate(self, model: nn.Module, name: str = "rows") -> dict[str, Any]:
            return {name: torch.tensor(3)}

    plain, direct, optional = Ridge(), Direct(), WithAnOption()
    model, given = plain.model().double(), {"x": torch.tensor(5.0)}
    (batch,) = plain.batches("upper", None)
    expected = plain.upper_loss(model, batch)
    assert upper_loss(plain, model, given, batch) == expected
    assert upper_loss(direct, model, given, batch) == expected + 5
    assert upper_loss(optional, model, given, batch) == 2 * expected
    assert evaluate(direct, model, given) == {"x": 5.0} and evaluate(optional, model, given) == {"rows": 3.0}


def test_a_function_set_on_an_instance_is_called() -> None:
    problem = Ridge()
    (batch,) = problem.batches("upper", None)
    problem.upper_loss = lambda model, hyperparameters, batch: hyperparameters["x"]  # type: ignore[method-assign]
    assert upper_loss(problem, problem.model(), {"x": torch.tensor(1.0)}, batch) == 1


def test_every_part_of_a_training_may_ask_for_the_hyperparameters() -> None:
    class Shaped(Ridge):
        def model(self, hyperparameters: Hyperparameters) -> nn.Module:
            return nn.Linear(3, hyperparameters["width"])

        def optimizer(self, model: nn.Module, hyperparameters: Hyperparameters) -> torch.optim.Optimizer:
            return torch.optim.SGD(model.parameters(), lr=hyperparameters["lr"])

        def batches(self, level: Level, generator: torch.Generator | None, hyperparameters: Hyperparameters) -> Any:
            return minibatches(self.lower, hyperparameters["batch"], generator)

        def refit_batches(self, generator: torch.Generator | None, hyperparameters: Hyperparameters) -> Any:
            return [hyperparameters["batch"]]

    config, shaped, plain = {"width": 5, "lr": 0.25, "batch": 4}, Shaped(), Ridge()
    model = make_model(shaped, config)
    assert model.get_parameter("weight").shape == (5, 3) and model.get_parameter("weight").dtype == torch.double
    assert make_optimizer(shaped, model, config).param_groups[0]["lr"] == 0.25
    assert [len(batch[0]) for batch in make_batches(shaped, "lower", None, config)] == [4, 4, 4]
    assert make_refit_batches(shaped, None, config) == [4]
    model = make_model(plain, config)
    assert model.get_parameter("weight").shape == (1, 3)
    assert isinstance(make_optimizer(plain, model, config), torch.optim.LBFGS)
    assert [len(batch[0]) for batch in make_batches(plain, "lower", None, config)] == [12]
    assert make_refit_batches(plain, None, config) is None


def test_a_model_that_is_none_is_an_error() -> None:
    problem = Ridge()
    problem.model = lambda: 5  # type: ignore[method-assign,assignment,return-value]
    with pytest.raises(ProblemError, match=r"Ridge.model\(\) must return a torch.nn.Module, got int"):
        make_model(problem, {})


def test_what_a_problem_supports_follows_from_what_it_defines() -> None:
    class Divided(Ridge):
        def shard(self, index: int, count: int) -> BilevelProblem:
            return self

    assert isinstance(Divided(), SupportsShards) and not isinstance(Ridge(), SupportsShards)
    assert not isinstance(Ridge(), SupportsLowerMap | LargeUpperLevel)


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


def test_the_size_of_minibatches_may_be_a_number_of_numpy():
    assert [len(batch[0]) for batch in minibatches((torch.arange(7),), np.int64(3), None)] == [3, 3, 1]


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
