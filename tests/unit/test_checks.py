"""What is refused before anything is trained: one broken problem for each error."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from raybilevel.errors import ConfigError, NotFiniteError, ProblemError
from raybilevel.methods import Default, HypergradientDescent, Paper
from raybilevel.problem import BilevelProblem, Hyperparameters, Level, minibatches
from raybilevel.search import check_problem
from raybilevel.search._checks import check_search, check_upper_variables
from raybilevel.space import STARTS, Parameter, Space
from tests.problems_for_tests import Network, Ridge
from tests.tiny_problems import ManyParabolas


class Broken(Ridge):
    """A ridge in which single parts can be replaced."""

    def __init__(self, **parts: Callable[..., Any]) -> None:
        super().__init__()
        self.parts = parts

    def model(self) -> Any:
        return self.parts["model"]() if "model" in self.parts else super().model()

    def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Any) -> Any:
        loss = super().lower_loss(model, hyperparameters, batch)
        return self.parts["lower"](loss) if "lower" in self.parts else loss

    def upper_loss(self, model: nn.Module, batch: Any) -> Any:
        loss = super().upper_loss(model, batch)
        return self.parts["upper"](loss) if "upper" in self.parts else loss

    def batches(self, level: Level, generator: torch.Generator | None) -> Iterable[Any]:
        return self.parts[f"{level}_batches"]() if f"{level}_batches" in self.parts else super().batches(level, None)


def test_a_sound_problem_passes_and_leaves_the_random_numbers_alone():
    before = torch.get_rng_state()
    check_problem(Broken(), Ridge().space)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("level", ["lower", "upper"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda loss: loss.expand(2), r"must return a tensor of shape \(\), got \(2,\)"),
        (lambda loss: loss.item(), r"must return a tensor of shape \(\), got float"),
        (lambda loss: loss.detach(), "does not depend on the model's parameters"),
        (lambda loss: loss.detach() * torch.ones((), requires_grad=True), "does not depend on the model's parameters"),
        (lambda loss: loss * (1 + 1j), r"must return a real number, got one of torch\.complex128"),
    ],
)
def test_a_loss_that_cannot_be_differentiated(level: str, change: Callable[[Tensor], Any], message: str):
    with pytest.raises(ProblemError, match=f"{level}_loss {message}"):
        check_problem(Broken(**{level: change}), Ridge().space)


@pytest.mark.parametrize("level", ["lower", "upper"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite(level: str, value: float):
    with pytest.raises(NotFiniteError, match=f"{level}_loss is {value}"):
        check_problem(Broken(**{level: lambda loss: loss * value}), Ridge().space)


def test_a_gradient_that_is_not_finite():
    def kinked(loss: Tensor) -> Tensor:
        return loss + (loss - loss.detach()).abs().sqrt()  # 0, with an infinite slope

    with pytest.raises(
        NotFiniteError, match=r"lower_loss is .* at the start weights, but its gradient in the weights is"
    ):
        check_problem(Broken(lower=kinked), Ridge().space)
    check_problem(Broken(upper=kinked), Ridge().space)  # which may be another matter at trained weights


@pytest.mark.parametrize("level", ["lower", "upper"])
@pytest.mark.parametrize("batches", [list, lambda: ["text"]])
def test_a_level_without_data(level: str, batches: Callable[[], Any]):
    with pytest.raises(ProblemError, match=f"batches\\('{level}', None\\) yields no tensors"):
        check_problem(Broken(**{f"{level}_batches": batches}), Ridge().space)


@pytest.mark.parametrize(
    ("model", "message"), [(nn.ReLU, "no parameters to train"), (lambda: "model", "must return a torch.nn.Module")]
)
def test_a_model_that_cannot_be_trained(model: Callable[[], Any], message: str):
    with pytest.raises(ProblemError, match=message):
        check_problem(Broken(model=model), Ridge().space)


def test_complex_weights_and_buffers_are_refused():
    class Rotated(nn.Linear):
        def __init__(self) -> None:
            super().__init__(3, 1, bias=False)
            self.register_buffer("angles", torch.polar(torch.ones(3), torch.arange(3.0)))

    with pytest.raises(ProblemError, match=r"model\(\): angles is complex.*torch\.view_as_real"):
        check_problem(Broken(model=Rotated), Ridge().space)
    with pytest.raises(ProblemError, match=r"model\(\): weight is complex"):
        check_problem(Broken(model=lambda: nn.Linear(3, 1, dtype=torch.cfloat)), Ridge().space)


class Looked(Network):
    """Logits of a table, whose gradient has the rows that were looked up."""

    def model(self) -> nn.Module:
        return nn.Linear(2, 4)

    def upper_loss(self, model: nn.Module, batch: Any) -> Tensor:
        logits = nn.functional.embedding(batch[1], model.get_parameter("weight"), sparse=True)
        return nn.functional.cross_entropy(logits, batch[1])


class Recomputed(Network):
    """Its first layer runs again in a backward pass of its own."""

    def upper_loss(self, model: nn.Module, batch: Any) -> Tensor:
        inputs = batch[0].clone().requires_grad_()
        hidden = checkpoint(model.get_submodule("0"), inputs, use_reentrant=True)
        return nn.functional.cross_entropy(model.get_submodule("4")(hidden), batch[1])


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Looked, "has sparse gradients, as of an embedding"),
        (Recomputed, r"has another gradient in the weights by torch\.autograd\.grad than.*use_reentrant=False"),
    ],
)
def test_gradients_that_only_a_training_has_are_refused(kind: type[Network], words: str):
    with pytest.raises(ProblemError, match=rf"{kind.__name__}\.\w+_loss {words}"):
        check_problem(kind(), Space((Parameter(("decay",), 1e-4, 1.0, log=True),)))


def test_a_loss_that_changes_weights_is_refused():
    class Clipped(Network):
        def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Any) -> Tensor:
            with torch.no_grad():
                model.get_parameter("0.weight").clamp_(-0.1, 0.1)
            return super().lower_loss(model, hyperparameters, batch)

    with pytest.raises(ProblemError, match=r"Clipped\.lower_loss changes the model \(0\.weight\)"):
        check_problem(Clipped(), Space((Parameter(("decay",), 1e-4, 1.0, log=True),)))


def test_frozen_parameters_are_no_parameters_to_train():
    with pytest.raises(ProblemError, match="no parameters to train"):
        check_problem(Broken(model=lambda: Ridge().model().requires_grad_(False)), Ridge().space)


@pytest.mark.parametrize(
    ("setting", "values"),
    [
        ("epochs", [0, -1, 2.5, None, "10", True]),
        ("evaluate_every", [0, 1.5, "2"]),
        ("accumulate", [0, "2", None]),
        ("patience", [0, "3", 1.5]),
        ("clip", [0, -1.0, math.nan, "1", True]),
        ("ema", [0, 1, "0.9"]),
        ("schedule_interval", ["epochs", None]),
        ("upper_likelihood", ["gauss"]),
        ("upper_metric", ["", None, "lower_loss", "config/lr"]),
        ("optimistic", ["yes", 1]),
        ("dtype", ["float32", torch.int64, float]),
        ("device", ["gpu", None]),
    ],
)
def test_a_setting_that_is_not_one_is_named_in_one_line(setting: str, values: list[Any]):
    for value in values:
        problem = Ridge()
        setattr(problem, setting, value)
        with pytest.raises(ProblemError, match=rf"^Ridge\.{setting} must be .*, got {re.escape(repr(value))}$"):
            check_problem(problem, problem.space)


def test_numbers_of_numpy_are_settings():
    problem = Ridge()
    problem.epochs, problem.ema = np.int64(2), np.float32(0.5)  # type: ignore[assignment]
    check_problem(problem, problem.space)


@dataclass
class Pair:
    inputs: Tensor
    targets: Tensor

    def to(self, device: Any) -> Pair:
        return Pair(self.inputs.to(device), self.targets.to(device))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (
            Pair(torch.zeros(2, 3), torch.zeros(2)),
            r"yields no tensors but Pair; a batch is.*\(batch\.x, batch\.y\)",
        ),
        ((torch.zeros(2, 3), Pair(torch.zeros(1), torch.zeros(1))), "yields beside its tensors Pair; a batch is"),
        ((np.zeros((2, 3)), np.zeros(2)), r"no tensors but ndarray.*use torch\.as_tensor"),
        (None, "yields no tensors but NoneType"),
    ],
)
def test_a_batch_whose_tensors_cannot_be_moved(batch: Any, message: str):
    with pytest.raises(ProblemError, match=message):
        check_problem(Broken(lower_batches=lambda: [batch]), Ridge().space)


class Detached(torch.autograd.Function):
    """Twice its argument, with a backward pass that torch takes for a constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> Tensor:
        return (2 * slopes[0]).detach()


@pytest.mark.parametrize(
    ("use", "smooth"),
    [
        (lambda extra, weights: 0 * extra, False),
        (lambda extra, weights: 1e-30 * extra, False),
        (lambda extra, weights: extra.log() / extra.log() * weights.square().sum(), False),
        (lambda extra, weights: (extra.log() - extra.log() + extra**0) * weights.square().sum(), False),
        (lambda extra, weights: (extra.sin() ** 2 + extra.cos() ** 2) * weights.square().sum(), False),
        (lambda extra, weights: extra - extra.detach(), False),
        (lambda extra, weights: extra, False),
        (lambda extra, weights: Detached.apply(extra * weights).square().sum(), True),
        (lambda extra, weights: 0 * extra * weights.square().sum(), False),
        (lambda extra, weights: (extra - 0.5).relu() * weights.square().sum(), True),
        (lambda extra, weights: (extra - 0.9).relu() * weights.square().sum(), True),
        (lambda extra, weights: extra.clamp(max=0.1) * weights.square().sum(), True),
        (lambda extra, weights: extra * (weights - weights.detach()).square().sum(), False),
    ],
)
def test_a_hyperparameter_that_changes_no_gradient_is_searched_by_values(
    use: Callable[[Tensor, Tensor], Tensor], smooth: bool, caplog: pytest.LogCaptureFixture
):
    class Idle(Ridge):
        def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Any) -> Tensor:
            extra = use(hyperparameters["extra"], model.get_parameter("weight"))
            return super().lower_loss(model, hyperparameters, batch) + extra

    space = Space((*Ridge().space.parameters, Parameter(("extra",), 0.0, 1.0)))
    assert check_problem(Idle(), space).smooth[-1] is smooth
    assert ("extra: it changes nothing in the gradient of Idle.lower_loss in the weights" in caplog.text) is not smooth


def test_a_hyperparameter_that_changes_f_by_rounding_only_is_searched_by_values():
    class Cancelling(Ridge):
        def upper_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Any) -> Tensor:  # type: ignore[override]
            extra = hyperparameters["extra"]
            return super().upper_loss(model, batch) * ((7 * extra).log() - extra.log())

    space = Space((*Ridge().space.parameters, Parameter(("extra",), 1e-3, 1.0, log=True)))
    assert check_problem(Cancelling(), space).smooth == (True, True, True, False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_decay_that_is_next_to_nothing_at_the_centre_has_a_gradient(dtype: torch.dtype):
    problem, space = Network(), Space((Parameter(("decay",), 1e-12, 1e-1, log=True),))
    problem.dtype = dtype
    assert check_problem(problem, space).smooth == (True,)


def test_a_gradient_that_only_later_batches_or_moved_weights_have_is_one():
    """One weight for each example, and a penalty on weights that start at zero."""

    class Weighted(Network):
        def model(self) -> nn.Module:
            model = nn.Linear(4, 2)
            nn.init.zeros_(model.weight)
            return model

        def batches(self, level: Level, generator: torch.Generator | None) -> Iterable[Any]:
            return minibatches((self.x, self.y, torch.arange(len(self.x))), 8, generator)

        def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Any) -> Tensor:
            losses = nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")
            factors = torch.where(batch[2] == 20, hyperparameters["last"], 1.0)
            return (factors * losses).mean() + hyperparameters["decay"] * model.get_parameter("weight").square().sum()

    space = Space((Parameter(("decay",), 1e-4, 1.0, log=True), Parameter(("last",), 0.0, 1.0)))
    assert check_problem(Weighted(), space).smooth == (True, True)


@pytest.mark.parametrize("use", [lambda value: 0.0, lambda value: value.item(), lambda value: value.detach()])
def test_a_hyperparameter_that_the_lower_loss_does_not_follow_is_searched_by_values(use: Callable[[Tensor], Any]):
    class Deaf(Ridge):
        def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Any) -> Tensor:
            return super().lower_loss(model, hyperparameters, batch) + use(hyperparameters["extra"])

    space = Space((*Ridge().space.parameters, Parameter(("extra",), 0.0, 1.0)))
    found = check_problem(Deaf(), space)
    assert found.smooth == (*(True for _ in Ridge().space.parameters), False) and found.names == space.names


def test_constants_reach_the_loss():
    class WithConstants(Ridge):
        def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Any) -> Tensor:
            assert hyperparameters["kind"] == "a" and isinstance(hyperparameters["decay"]["shift"], Tensor)
            return super().lower_loss(model, hyperparameters, batch)

    check_problem(WithConstants(), Ridge().space, {"kind": "a", "decay": {"shift": 0.5}})


def test_every_abstract_part_is_asked_for():
    assert BilevelProblem.__abstractmethods__ == {"model", "lower_loss", "upper_loss", "batches"}


# Where x is a module.


def test_a_large_upper_level_is_tried_before_a_descent():
    check_upper_variables(ManyParabolas(3), {})
    with pytest.raises(ProblemError, match="no hyperparameter to search"):
        check_upper_variables(Network(), {})

    class Idle(ManyParabolas):
        def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Any) -> Tensor:
            return model.get_parameter("weight").square().sum()

    with pytest.raises(ProblemError, match="depends on"):
        check_upper_variables(Idle(3), {})


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_large_upper_level_with_a_loss_that_is_not_finite(value: float):
    class Infinite(ManyParabolas):
        def upper_loss(self, model: nn.Module, batch: Any) -> Tensor:
            return super().upper_loss(model, batch) * value

    with pytest.raises(NotFiniteError, match=f"upper_loss is {value}"):
        check_upper_variables(Infinite(3), {})


# What a method refuses.


@pytest.mark.parametrize("method", [Default(), Paper()])
def test_a_method_for_hyperparameters_refuses_a_module(method: Default | Paper):
    check_search(Ridge(), Ridge().space, {}, method)
    with pytest.raises(ConfigError, match=r"searches hyperparameters.*method='hypergradient'"):
        check_search(ManyParabolas(3), STARTS, {}, method)


def test_a_descent_takes_a_box_and_a_module_and_no_shards_that_are_not_there():
    check_search(Ridge(), Ridge().space, {}, HypergradientDescent())
    check_search(ManyParabolas(3), STARTS, {}, HypergradientDescent())
    with pytest.raises(ProblemError, match="a search space's descents see all data"):
        check_search(Ridge(), Ridge().space, {}, HypergradientDescent(shards=2))
    with pytest.raises(ProblemError, match="has no shard"):
        check_search(ManyParabolas(3), STARTS, {}, HypergradientDescent(shards=2))
