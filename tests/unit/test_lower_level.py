from __future__ import annotations

import inspect
import io
import math
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raybilevel._lower import training as lower_level
from raybilevel._lower.training import LowerLevelTraining, dump_checkpoint, load_checkpoint, refit, train
from raybilevel.errors import CheckpointError, NotFiniteError, ProblemError
from raybilevel.problem import BilevelProblem, Hyperparameters, Level
from raybilevel.tune._trainable import checkpoint_due
from tests.problems_for_tests import Network, Ridge, vector

X = vector(0.1, 2.0, 0.5)
NETWORK = {"decay": 0.01}


def weights_of(training: LowerLevelTraining) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in training.model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def run(training: LowerLevelTraining) -> dict[str, Tensor]:
    while not training.finished:
        training.run_epoch()
    return weights_of(training)


# What a training observes.


def test_a_trained_ridge_is_the_closed_form():
    problem = Ridge()
    trained, checkpoint = train(problem, problem.config(X))
    y = problem.solution(X)
    # L-BFGS goes down to a gradient of 1e-13, the smallest eigenvalue of the Hessian is about 0.5
    found = load_checkpoint(checkpoint)["model"]["weight"][0]
    assert found.tolist() == pytest.approx(y.tolist(), abs=1e-11)
    assert trained.lower_loss == pytest.approx(problem.f(X, y).item(), rel=1e-12)
    assert trained.upper_loss == pytest.approx(problem.F(y).item(), rel=1e-10)


def test_danskin_gradient_against_differences_of_the_value_function():
    # gradient descent whose error shrinks by 0.9 a step: down to rounding
    problem = Ridge(epochs=400, optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=0.3))
    trained, _ = train(problem, problem.config(X))
    h = 1e-5
    for j, step in enumerate(h * torch.eye(3, dtype=torch.double)):
        above, below = (problem.f(x, problem.solution(x)) for x in (X + step, X - step))
        # the central difference errs by some h^2 = 1e-10 and by rounding 1e-16 / h = 1e-11
        assert trained.lower_gradient["decay"][str(j)] == pytest.approx(((above - below) / (2 * h)).item(), abs=1e-9)


def test_metrics_are_the_problems_own():
    class Evaluated(Ridge):
        def evaluate(self, model: nn.Module) -> dict[str, float]:
            assert not model.training and not torch.is_grad_enabled()
            return {"first_weight": model.get_parameter("weight")[0, 0]}

    problem = Evaluated()
    trained, _ = train(problem, problem.config(X))
    assert trained.metrics == {"first_weight": pytest.approx(problem.solution(X)[0].item(), abs=1e-11)}
    assert type(trained.metrics["first_weight"]) is float


def test_passes_count_the_gradients_of_the_epochs_and_the_one_at_the_end():
    problem = Ridge(batch=5, epochs=7, optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=0.1))
    assert train(problem, problem.config(X))[0].passes == 8


def test_no_pass_is_made_to_count_examples_and_none_for_losses_that_are_not_asked_for():
    class Counted(Ridge):
        def batches(self, level: Level, generator: torch.Generator | None) -> Iterator[Any]:
            passes.append((level, generator is not None))
            return super().batches(level, generator)

    passes: list[tuple[str, bool]] = []
    problem = Counted(batch=5, epochs=5, optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=0.1))
    problem.evaluate_every = 2
    training, told = LowerLevelTraining(problem, problem.config(X)), []
    while not training.finished:
        training.run_epoch()
        assert training.passes == training.epoch
        if training.reports:
            told.append(training.epoch)
            training.losses()
    assert told == [2, 4, 5]
    assert passes.count(("lower", True)) == 5 and passes.count(("upper", True)) == 0
    assert passes.count(("lower", False)) == passes.count(("upper", False)) == 3


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.double, 1e-11)])
def test_a_training_runs_in_the_problems_precision(dtype: torch.dtype, tolerance: float):
    # L-BFGS ends where it sees no more decrease: with 7 digits of f that is about sqrt(1e-7) from the minimiser
    problem = Ridge(dtype=dtype)
    trained, checkpoint = train(problem, problem.config(X))
    found = load_checkpoint(checkpoint)["model"]["weight"]
    assert found.dtype == dtype
    assert found[0].tolist() == pytest.approx(problem.solution(X).tolist(), abs=tolerance)
    assert trained.lower_gradient["decay"]["1"] == pytest.approx(problem.solution(X)[1].item() ** 2 / 2, abs=tolerance)


def test_a_loss_that_is_not_finite_ends_the_training():
    problem = Ridge(epochs=2000, optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=100.0))
    training = LowerLevelTraining(problem, problem.config(X))
    with pytest.raises(NotFiniteError, match=r"lower-level loss is (inf|nan) in epoch \d+"):
        run(training)
    assert training.epoch < 200  # each step multiplies the error by about -100, and 1e308 is the largest number


# Cold starts: F and v are functions of x, and nothing of an upper-level step reaches a training.


@pytest.mark.parametrize("function", [LowerLevelTraining.__init__, train, refit])
def test_no_training_takes_weights(function: Callable[..., Any]):
    assert set(inspect.signature(function).parameters) <= {"self", "problem", "config", "seed", "refit"}


def test_every_public_function_of_the_module_is_known():
    """A new way into a training must be looked at here: could it start from weights that have seen validation data?"""
    own = {n for n, v in vars(lower_level).items() if getattr(v, "__module__", "") == lower_level.__name__}
    assert own == {
        "TrainedLowerLevel", "LowerLevelTraining", "loss_of_step", "groups", "train_epoch", "train", "observed",
        "refit", "dump_checkpoint", "load_checkpoint",
    }  # fmt: skip


def test_initial_weights_and_the_order_of_batches_depend_on_the_seed_alone():
    trainings, orders = [], []
    for seed, decay in ((3, 0.01), (3, 1.0), (4, 0.01)):
        problem = Network()
        trainings.append(weights_of(training := LowerLevelTraining(problem, {"decay": decay}, seed)))
        run(training)
        orders.append(torch.cat(problem.seen))
    assert same(trainings[0], trainings[1]) and torch.equal(orders[0], orders[1])
    assert not same(trainings[0], trainings[2]) and not torch.equal(orders[0], orders[2])


def test_equal_trainings_are_equal_whatever_the_global_seed():
    torch.manual_seed(0)
    first = run(LowerLevelTraining(Network(), NETWORK, 3))
    torch.manual_seed(1)
    assert same(first, run(LowerLevelTraining(Network(), NETWORK, 3)))


def test_a_training_leaves_the_global_random_numbers_alone():
    before = torch.get_rng_state()
    run(LowerLevelTraining(Network(), NETWORK))
    assert torch.equal(torch.get_rng_state(), before)


def test_two_trainings_side_by_side_do_not_disturb_each_other():
    alone = run(LowerLevelTraining(Network(), NETWORK, 3))
    one, other = (LowerLevelTraining(Network(), NETWORK, seed) for seed in (3, 5))
    while not one.finished:
        one.run_epoch()
        other.run_epoch()
        one.losses()  # nor does a look at the losses
    assert same(weights_of(one), alone)


# Checkpoints.

RESUMABLE: dict[str, Callable[[], tuple[BilevelProblem, dict[str, Any]]]] = {
    "dropout, batch norm, Adam, shuffled": lambda: (Network(), NETWORK),
    "L-BFGS": lambda: (
        Ridge(batch=5, epochs=4, optimizer=lambda m: torch.optim.LBFGS(m.parameters(), lr=0.1, max_iter=2)),
        Ridge().config(X),
    ),
    "float32, momentum": lambda: (
        Ridge(batch=5, epochs=4, dtype=torch.float32, optimizer=lambda m: torch.optim.SGD(m.parameters(), 0.1, 0.9)),
        Ridge().config(X),
    ),
}


@pytest.mark.parametrize("stop", [0, 1, 3, 4])
@pytest.mark.parametrize("kind", RESUMABLE)
def test_a_resumed_training_is_bitwise_the_uninterrupted_one(kind: str, stop: int):
    uninterrupted = LowerLevelTraining(*RESUMABLE[kind](), seed=7)
    expected = run(uninterrupted)
    stopped = LowerLevelTraining(*RESUMABLE[kind](), seed=7)
    for _ in range(stop):
        stopped.run_epoch()
    resumed = LowerLevelTraining(*RESUMABLE[kind](), seed=7)
    resumed.load_state_dict(load_checkpoint(dump_checkpoint(stopped)))
    assert (resumed.epoch, resumed.finished) == (stop, stop == 4)
    assert same(run(resumed), expected)
    assert resumed.passes == uninterrupted.passes
    assert resumed.losses() == uninterrupted.losses()


def test_resuming_restores_more_than_the_weights():
    """The test above would be worth little if the weights alone led to the same end."""
    stopped = LowerLevelTraining(Network(), NETWORK, 7)
    stopped.run_epoch()
    resumed = LowerLevelTraining(Network(), NETWORK, 7)
    resumed.model.load_state_dict(stopped.model.state_dict())
    resumed.epoch = 1
    assert not same(run(resumed), run(stopped))


def test_a_checkpoint_is_read_from_a_file_too(tmp_path: Path):
    training = LowerLevelTraining(Network(), NETWORK)
    (tmp_path / "c.pt").write_bytes(dump_checkpoint(training))
    assert same(load_checkpoint(tmp_path / "c.pt")["model"], weights_of(training))


class Malicious:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("kind", ["torch", "pickle"])
def test_a_checkpoint_never_executes_code(tmp_path: Path, kind: str):
    state, harm = {"format": 3, "model": Malicious(tmp_path / "harm")}, tmp_path / "harm"
    buffer = io.BytesIO()
    if kind == "torch":
        torch.save(state, buffer)
    else:
        pickle.dump(state, buffer)
    with pytest.raises(CheckpointError, match="cannot read"):
        load_checkpoint(buffer.getvalue())
    assert not harm.exists()
    buffer.seek(0)
    torch.load(buffer, weights_only=False) if kind == "torch" else pickle.load(buffer)
    assert harm.exists()  # so it was armed


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_checkpoint_is_an_error(share: float):
    whole = dump_checkpoint(LowerLevelTraining(Network(), NETWORK))
    with pytest.raises(CheckpointError, match="cannot read"):
        load_checkpoint(whole[: int(share * len(whole))])


def test_a_missing_checkpoint_is_an_error(tmp_path: Path):
    with pytest.raises(CheckpointError, match="cannot read"):
        load_checkpoint(tmp_path / "none.pt")


@pytest.mark.parametrize(("state", "found"), [({"format": 1}, "1"), ({"model": {}}, "None"), ([1], "list")])
def test_another_format_is_an_error(state: Any, found: str):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with pytest.raises(CheckpointError, match=f"has format {found}; this version reads 4"):
        load_checkpoint(buffer.getvalue())


@pytest.mark.parametrize(
    ("evaluate_every", "checkpoint_every", "saved"),
    [(1, 3, [3, 6, 9, 10]), (2, 3, [4, 6, 10]), (4, 1, [4, 8, 10]), (1, 20, [10]), (20, 1, [10])],
)
def test_a_checkpoint_is_due_at_the_next_report(evaluate_every: int, checkpoint_every: int, saved: list[int]):
    problem = Ridge(epochs=10, optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=0.1))
    problem.evaluate_every = evaluate_every
    training, found = LowerLevelTraining(problem, problem.config(X)), [0]
    while not training.finished:
        training.run_epoch()
        if training.reports and checkpoint_due(training, found[-1], checkpoint_every):
            found.append(training.epoch)
    assert found[1:] == saved


# Refits.


class Refittable(Ridge):
    def refit_batches(self, generator: torch.Generator | None) -> Any:
        both = zip(self.lower, self.upper, strict=True)
        return [tuple(torch.cat(pair) for pair in both)]

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {f"y{j}": float(weight) for j, weight in enumerate(model.get_parameter("weight")[0])}


def test_a_refit_trains_on_training_and_validation_data():
    problem = Refittable()
    found = refit(problem, problem.config(X))
    inputs = torch.cat([problem.lower[0], problem.upper[0]])
    targets = torch.cat([problem.lower[1], problem.upper[1]])
    y = torch.linalg.solve(inputs.T @ inputs / 42 + torch.diag(X), inputs.T @ targets / 42)
    assert found is not None
    assert list(found.values()) == pytest.approx(y.tolist(), abs=1e-11)  # as for the trained ridge


def test_a_problem_without_refit_data_cannot_be_refitted():
    problem = Ridge()
    assert refit(problem, problem.config(X)) is None
    with pytest.raises(ProblemError, match="no refit_batches"):
        LowerLevelTraining(problem, problem.config(X), refit=True).run_epoch()


def test_hyperparameters_arrive_as_tensors_of_the_config():
    class Typed(Ridge):
        def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Any) -> Tensor:
            assert math.isclose(hyperparameters["decay"]["0"].item(), 0.1) and hyperparameters["layers"] == 2
            return super().lower_loss(model, hyperparameters, batch)

    train(Typed(), {**Ridge().config(X), "layers": 2})


def test_a_slope_that_is_infinite_at_a_bound_costs_the_gradient_only(caplog: pytest.LogCaptureFixture):
    class Root(Ridge):
        def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Any) -> Tensor:
            return super().lower_loss(model, hyperparameters, batch) + hyperparameters["root"].sqrt()

    trained, _ = train(Root(dimension=1), {"decay": {"0": 0.5}, "root": 0.0})
    same, _ = train(Ridge(dimension=1), {"decay": {"0": 0.5}})
    assert (trained.upper_loss, trained.lower_loss) == (same.upper_loss, same.lower_loss)
    assert math.isnan(trained.lower_gradient["root"])
    assert trained.lower_gradient["decay"] == same.lower_gradient["decay"]
    assert "gradient in root is inf" in caplog.text
