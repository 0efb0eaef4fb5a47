"""Everything that a training calls is called before the first one; what fails is one line that names it."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from raybilevel.errors import ProblemError
from raybilevel.problem import Hyperparameters, Level, minibatches
from raybilevel.search import check_problem
from raybilevel.search._calls import Given
from raybilevel.space import Parameter, Space
from tests.problems_for_tests import Network, exact_optimizer

DECAY = Space((Parameter(("decay",), 1e-4, 1.0, log=True),))


@dataclass
class Sample:
    x: Tensor
    y: Tensor


class Batches(Network):
    """found: what `batches` returns."""

    def __init__(self, found: Any) -> None:
        super().__init__()
        self.found = found

    def batches(self, level: Level, generator: torch.Generator | None) -> Any:
        return self.found


def test_a_last_batch_of_one_is_found_before_a_training_finds_it():
    class Odd(Network):
        def batches(self, level: Level, generator: torch.Generator | None) -> Iterable[Any]:
            return minibatches((self.x[:17], self.y[:17]), 8, generator)  # 8, 8 and 1

    with pytest.raises(ProblemError, match=r"in train mode on a batch of 1, raised ValueError.*a last batch of one"):
        check_problem(Odd(), DECAY)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (None, "returned None; return an iterable"),
        (3, "raised TypeError: 'int' object is not iterable"),
        ([], "yields no tensors: it is empty"),
        ([Sample(torch.ones(2, 4), torch.zeros(2).long())], "yields no tensors but Sample; a batch is"),
    ],
)
def test_data_that_are_none(found: Any, message: str):
    with pytest.raises(ProblemError, match=rf"Batches\.batches\('lower', None\) {message}"):
        check_problem(Batches(found), DECAY)


@pytest.mark.parametrize("broken", ["lower_loss", "model", "optimizer", "evaluate", "batches"])
def test_what_a_part_raises_is_one_line(broken: str):
    def raises(*_: Any) -> Any:
        raise RuntimeError("out of luck\nand a second line")

    problem = Network()
    setattr(problem, broken, raises)
    with pytest.raises(ProblemError, match=rf"Network\.{broken}.* raised RuntimeError: out of luck$"):
        check_problem(problem, DECAY)


def test_a_loss_with_another_signature_is_named():
    class Short(Network):
        def lower_loss(self, model: nn.Module, batch: Any) -> Tensor:  # type: ignore[override]
            return F.cross_entropy(model(batch[0]), batch[1])

    with pytest.raises(ProblemError, match=r"Short\.lower_loss raised TypeError: .*positional argument"):
        check_problem(Short(), DECAY)


@pytest.mark.parametrize(
    ("refit", "message"),
    [
        ([], r"refit_batches\(generator\) yields no tensors"),
        ([torch.ones(3, 9)], "on the data of refit_batches, raised"),
    ],
)
def test_data_of_a_refit_are_tried(refit: Any, message: str):
    class Refit(Network):
        def refit_batches(self, generator: torch.Generator | None) -> Any:
            return refit

    with pytest.raises(ProblemError, match=message):
        check_problem(Refit(), DECAY)


def test_a_device_that_is_not_here_is_replaced_for_the_check():
    class Placed(Network):
        def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Any) -> Tensor:
            weight = torch.ones(2).to(self.device)  # class weights, for instance
            return F.cross_entropy(model(batch[0]), batch[1], weight) + hyperparameters["decay"] * weight.sum()

    problem = Placed()
    problem.device = "cuda:7"
    check_problem(problem, DECAY)
    assert problem.device == "cuda:7"
    problem.device = "gpu"
    with pytest.raises(ProblemError, match=r"Placed\.device must be a device of torch.*got 'gpu'"):
        check_problem(problem, DECAY)


def test_a_tensor_where_torch_wants_a_float_leads_to_functions_that_take_tensors():
    class Smoothed(Network):
        def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Any) -> Tensor:
            return F.cross_entropy(model(batch[0]), batch[1], label_smoothing=hyperparameters["decay"])  # type: ignore[arg-type]

    with pytest.raises(ProblemError, match=r"raised TypeError.*raybilevel\.functional"):
        check_problem(Smoothed(), DECAY)


@pytest.mark.parametrize(
    "message",
    [
        "mat1 and mat2 must have the same dtype, but got Double and Float",
        "expected scalar type Float but found Double",
        "Found dtype Double but expected Float",
    ],
)
def test_a_tensor_of_another_precision_leads_to_the_dtype_of_the_problem(message: str):
    def raises(*_: Any) -> Any:
        raise RuntimeError(message)

    problem = Network()
    problem.lower_loss = raises  # type: ignore[method-assign]
    with pytest.raises(ProblemError, match=rf"{message}; weights and batches are cast to the problem's dtype"):
        check_problem(problem, DECAY)


def test_a_function_of_numpy_leads_to_those_of_torch():
    class Rooted(Network):
        def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Any) -> Tensor:
            return self.upper_loss(model, batch) * np.sqrt(hyperparameters["decay"])

    with pytest.raises(ProblemError, match=r"raised RuntimeError: Can't call numpy.*torch's own functions keep the"):
        check_problem(Rooted(), DECAY)


def test_evaluate_leaves_the_model_alone():
    class Pruned(Network):
        def evaluate(self, model: nn.Module) -> dict[str, float]:
            weight = model.get_parameter("0.weight")
            weight.mul_(weight.abs() > 0.1)
            return {"kept": float(weight.count_nonzero())}

    with pytest.raises(ProblemError, match=r"Pruned\.evaluate changes the model \(0\.weight\), which is trained on"):
        check_problem(Pruned(), DECAY)


def test_lbfgs_takes_one_iteration_only():
    calls = []

    class Counted(Network):
        def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Any) -> Tensor:
            calls.append(model.training)
            return super().lower_loss(model, hyperparameters, batch)

        def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
            return exact_optimizer(model)

    check_problem(Counted(), DECAY)
    assert 2 <= sum(calls) <= 60


def test_constants_that_nothing_reads_are_warned_of(caplog: pytest.LogCaptureFixture):
    constants = {"lr": 1e-4, "batch": {"size": 32}}
    with caplog.at_level(logging.WARNING, logger="raybilevel"):
        check_problem(Network(), DECAY, constants)
    assert "Network reads no batch/size, lr: constants that nothing reads have no effect" in caplog.text

    class Reads(Network):
        def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Any) -> Tensor:
            assert hyperparameters["batch"]["size"] == 32
            return super().lower_loss(model, hyperparameters, batch) * hyperparameters.get("lr", 1.0)

    caplog.clear()
    check_problem(Reads(), DECAY, constants)
    assert not caplog.records


@pytest.mark.parametrize(
    "read",
    [
        lambda given: given["a"]["b"],
        lambda given: dict(**given["a"]),
        lambda given: [*given["a"].values()],
        lambda given: {key: entry for key, entry in given["a"].items()},  # noqa: C416
        lambda given: given["a"].pop("b"),
        lambda given: given["a"].get("b"),
        lambda given: dict(given["a"]),
    ],
)
def test_however_a_constant_is_read_it_is_noted(read: Any):
    given = Given({"a": {"b": 1.0}, "c": 2.0})
    read(given)
    assert given.unread({"a": {"b": 1.0}, "c": 2.0}) == ["c"]
