from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from raybilevel._lower.levels import Levels
from raybilevel._lower.training import LowerLevelTraining, train
from raybilevel._lower.variables import ConfigVariables
from raybilevel.errors import NotFiniteError, ProblemError
from raybilevel.problem import BilevelProblem, Hyperparameters
from raybilevel.search import check_problem
from raybilevel.space import Parameter, Space
from tests.problems_for_tests import Network, Ridge, levels_at, vector

X = vector(0.1, 2.0, 0.5)
ROUNDING = 1e-13  # sums of at most 30 terms of order one


def levels_of(problem: Ridge) -> tuple[Levels, Tensor, Tensor]:
    """The problem's levels, its decays x, and some weights y."""
    model = problem.model().to(problem.dtype)
    with torch.no_grad():
        model.get_parameter("weight").copy_(vector(0.3, -1.0, 2.0))
    return levels_at(problem, model, problem.config(X))


def danskin(problem: Ridge, config: dict[str, Any]) -> dict[str, Any]:
    """df/dx at the same weights."""
    training = LowerLevelTraining(problem, config)
    with torch.no_grad():
        training.model.get_parameter("weight").copy_(vector(0.3, -1.0, 2.0))
    return training.gradient()


@pytest.mark.parametrize("batch", [None, 5, 7])  # 12 rows below and 30 above: no size divides both
def test_means_are_weighted_by_the_size_of_the_batch(batch: int | None):
    problem = Ridge(batch=batch)
    levels, x, y = levels_of(problem)
    assert levels.value("lower", x, y) == pytest.approx(problem.f(X, y).item(), rel=ROUNDING)
    assert levels.value("upper", x, y) == pytest.approx(problem.F(y).item(), rel=ROUNDING)
    assert levels.loss_at("lower", x, y).item() == pytest.approx(problem.f(X, y).item(), rel=ROUNDING)


@pytest.mark.parametrize("batch", [None, 5])
def test_gradients_against_the_dense_formulas(batch: int | None):
    problem = Ridge(batch=batch)
    levels, x, y = levels_of(problem)
    above, below = levels.upper(x, y), levels.lower(x, y)
    inputs, targets = problem.upper
    assert above.value == pytest.approx(problem.F(y).item(), rel=ROUNDING)
    assert above.in_y.tolist() == pytest.approx((inputs.T @ (inputs @ y - targets) / 30).tolist(), rel=1e-12)
    inner = problem.hessian(X) @ (y - problem.solution(X))
    assert below.in_y.tolist() == pytest.approx(inner.tolist(), rel=1e-12)
    # f has the term x_j y_j^2 / 2
    assert below.in_x.tolist() == pytest.approx([0.3**2 / 2, 0.5, 2.0], rel=ROUNDING)


def test_other_weights_than_the_models_are_as_good_and_leave_it_alone():
    problem = Ridge(batch=5)
    levels, x, y = levels_of(problem)
    assert levels.value("lower", x, y + 1) == pytest.approx(problem.f(X, y + 1).item(), rel=ROUNDING)
    assert torch.equal(levels.y, y)


def test_a_level_that_does_not_depend_on_x_has_gradient_zero_in_it():
    levels, x, y = levels_of(Ridge())
    assert levels.upper(x, y).in_x.tolist() == [0.0, 0.0, 0.0]


def test_every_float_of_the_config_has_an_entry_in_the_gradient():
    problem = Ridge(batch=5)
    gradient = danskin(problem, {**problem.config(X), "layers": 3, "name": "a", "unused": 1.0})
    assert list(gradient["decay"].values()) == pytest.approx([0.3**2 / 2, 0.5, 2.0], rel=ROUNDING)
    assert gradient["unused"] == 0.0
    assert set(gradient) == {"decay", "unused"}


def test_an_entry_of_the_gradient_that_is_not_finite_is_not_known(caplog: pytest.LogCaptureFixture):
    class Root(Ridge):
        def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Any) -> Tensor:
            return super().lower_loss(model, hyperparameters, batch) + hyperparameters["root"].sqrt()

    problem = Root()
    found = danskin(problem, {**problem.config(X), "root": 0.0})
    assert math.isnan(found["root"]) and all(map(math.isfinite, found["decay"].values()))
    assert "the lower level's gradient in root is inf" in caplog.text


@pytest.mark.parametrize("batch", [None, 5])
def test_gradients_are_charged_and_values_are_not(batch: int | None):
    levels, x, y = levels_of(Ridge(batch=batch))
    levels.value("lower", x, y)
    assert levels.passes == 0
    levels.lower(x, y)
    assert levels.passes == 1
    levels.upper(x, y)
    assert levels.passes == 1 + 30 / 12


def test_levels_are_taken_in_eval_mode():
    problem = Network()
    model = problem.model()
    model.train()
    levels, x, y = levels_at(problem, model, {"decay": 0.1})
    assert levels.value("upper", x, y) == levels.value("upper", x, y)  # dropout would differ
    assert not model.training


class Checkpointed(Network):
    """Activations are not kept, but made again when the loss is differentiated."""

    def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Any) -> Tensor:
        plain = super().lower_loss
        return checkpoint(lambda *given: plain(model, hyperparameters, given), *batch, use_reentrant=False)


def test_what_is_computed_again_is_computed_at_the_same_weights():
    found = []
    for problem in (Network(), Checkpointed()):
        torch.manual_seed(0)
        levels, x, y = levels_at(problem, problem.model(), {"decay": 0.1})
        found.append(levels.lower(x, y + 0.5).in_y)
    assert torch.equal(*found)


@pytest.mark.parametrize("level", ["lower", "upper"])
def test_a_loss_that_is_not_finite_is_an_error(level: str):
    class Infinite(Ridge):
        def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Any) -> Tensor:
            return super().lower_loss(model, hyperparameters, batch) * (math.inf if level == "lower" else 1)

        def upper_loss(self, model: nn.Module, batch: Any) -> Tensor:
            return super().upper_loss(model, batch) * math.inf

    problem = Infinite()
    training = LowerLevelTraining(problem, problem.config(X))
    with pytest.raises(NotFiniteError, match=f"{level}-level loss is inf"):
        training.losses()


def test_floats_become_tensors_and_the_rest_stays():
    problem = Ridge(dtype=torch.float32)
    variables = ConfigVariables({"a": {"b": 0.5}, "layers": 3, "name": "x", "on": True}, problem)
    given = variables.given(variables.x)
    assert variables.x.dtype == given["a"]["b"].dtype == torch.float32 and given["a"]["b"].shape == ()
    assert {name: given[name] for name in ("layers", "name", "on")} == {"layers": 3, "name": "x", "on": True}


def test_batches_that_are_all_empty_are_found_before_anything_is_divided():
    class Empty(Ridge):
        def batch_size(self, batch: Any) -> int:
            return 0

    problem = Empty()
    with pytest.raises(ProblemError, match="yields no examples"):
        LowerLevelTraining(problem, problem.config(X)).losses()


def test_every_abstract_part_is_asked_for():
    assert BilevelProblem.__abstractmethods__ == {"model", "lower_loss", "upper_loss", "batches"}


class Refusing(nn.LSTM):
    """A recurrent layer as cuDNN has it: in eval mode its backward pass raises."""

    def forward(self, *given: Any) -> Any:
        states, last = super().forward(*given)
        if torch.backends.cudnn.enabled and not self.training and states.requires_grad:
            states.register_hook(self.refuse)
        return states, last

    @staticmethod
    def refuse(gradient: Tensor) -> None:
        raise RuntimeError("cudnn RNN backward can only be called in training mode")


class Recurrent(Network):
    """The small classifier reads its inputs one by one."""

    def model(self) -> nn.Module:
        return nn.ModuleDict({"layer": Refusing(1, 3, batch_first=True), "head": nn.Linear(3, 2)})

    def upper_loss(self, model: Any, batch: Any) -> Tensor:
        states, _ = model["layer"](batch[0].unsqueeze(-1))
        return nn.functional.cross_entropy(model["head"](states[:, -1]), batch[1])


def test_recurrent_layers_are_differentiated_in_eval_mode():
    problem = Recurrent()
    torch.manual_seed(0)
    levels, x, y = levels_at(problem, problem.model(), {"decay": 0.1})
    before = torch.backends.cudnn.enabled
    found = levels.lower(x, y).in_y
    product = levels.linearise(x, y).hessian(y)
    assert found.any() and product.any()
    assert torch.backends.cudnn.enabled is before is True


def test_recurrent_layers_are_differentiated_in_eval_mode_by_the_checks_too():
    check_problem(Recurrent(), Space((Parameter(("decay",), 1e-4, 1.0, log=True),)))
    assert torch.backends.cudnn.enabled


def test_a_loss_may_differentiate_its_model_itself():
    """As a penalty on the slope in the inputs does."""

    class Smooth(Ridge):
        def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Any) -> Tensor:
            inputs = batch[0].clone().requires_grad_()
            (slope,) = torch.autograd.grad(model(inputs).sum(), inputs, create_graph=True)
            # Of a linear model it is the weights themselves, in each row.
            penalty = (self.decay(hyperparameters) * slope.square().mean(0)).sum() / 2
            return self.upper_loss(model, batch) + penalty

    found, expected = (train(problem, problem.config(X))[0] for problem in (Smooth(), Ridge()))
    assert found.lower_loss == pytest.approx(expected.lower_loss, rel=1e-10)
    assert found.upper_loss == pytest.approx(expected.upper_loss, rel=1e-8)


def test_sparse_gradients_are_refused():
    class Sparse(Network):
        def model(self) -> nn.Module:
            return nn.Sequential(nn.Embedding(4, 2, sparse=True))

    with pytest.raises(ProblemError, match=r"Sparse: the embedding 0 has sparse gradients, .* leave out sparse=True"):
        levels_at(Sparse(), Sparse().model(), {"decay": 0.1})


class NoisyInputs(Ridge):
    """Inputs get noise whose level is the first decay. evaluations: of the lower-level loss."""

    evaluations = 0

    def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Any) -> Tensor:
        self.evaluations += 1
        noise = hyperparameters["decay"]["0"] * torch.randn_like(batch[0])
        return super().lower_loss(model, hyperparameters, (batch[0] + noise, batch[1]))


@pytest.mark.parametrize("batch", [None, 5])
def test_a_loss_that_draws_is_its_mean_over_draws_that_are_the_same_everywhere(batch: int | None):
    problem = NoisyInputs(batch=batch)
    levels, x, y = levels_of(problem)
    torch.manual_seed(9)
    before = torch.get_rng_state()
    value = levels.value("lower", x, y)
    draws = problem.evaluations // (1 if batch is None else 3)
    assert 4 <= draws <= 8
    assert torch.equal(before, torch.get_rng_state())
    assert levels.value("lower", x, y) == value
    assert levels.loss_at("lower", x, y).item() == pytest.approx(value, rel=1e-12)
    # The same draws at both ends of a difference make it one of a smooth function.
    step = 1e-6 * torch.eye(len(x), dtype=x.dtype)[0]
    difference = (levels.value("lower", x + step, y) - levels.value("lower", x - step, y)) / 2e-6
    assert levels.lower(x, y).in_x[0].item() == pytest.approx(difference, rel=1e-6)
    model = problem.model().double()
    given = {"decay": {name: vector(value)[0] for name, value in problem.config(X)["decay"].items()}}
    by_hand = []
    with torch.no_grad():
        model.get_parameter("weight").copy_(y)
        for seed in range(draws):
            torch.manual_seed(seed)
            parts = [(problem.lower_loss(model, given, b), len(b[0])) for b in problem.batches("lower", None)]
            by_hand.append(sum(loss.item() * size for loss, size in parts) / sum(size for _, size in parts))
    torch.set_rng_state(before)
    assert value == pytest.approx(sum(by_hand) / draws, rel=1e-12)


@pytest.mark.parametrize("batch", [None, 5])
def test_each_draw_is_charged_a_pass(batch: int | None):
    levels, x, y = levels_of(NoisyInputs(batch=batch))
    levels.value("lower", x, y)
    levels.lower(x, y)
    assert levels.passes == levels._draws["lower"] >= 4
    product, at_once = levels.linearise(x, y).hessian(y), levels.linearise(x, y)
    assert torch.equal(at_once.hessian(y), product) and torch.equal(at_once.hessian(y), product)


def test_a_loader_that_draws_its_seed_is_no_loss_that_draws():
    class Loaded(NoisyInputs):
        def batches(self, level: Any, generator: torch.Generator | None) -> Any:
            return DataLoader(TensorDataset(*(self.lower if level == "lower" else self.upper)), 6)

        def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Any) -> Tensor:
            self.evaluations += 1
            return Ridge.lower_loss(self, model, hyperparameters, batch)

    problem = Loaded()
    levels, x, y = levels_of(problem)
    levels.value("lower", x, y)
    assert problem.evaluations == 2
