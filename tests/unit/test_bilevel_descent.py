"""Descents along hypergradients in one process: the optimum they find, what they judge it by, resuming."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from ray import tune
from torch import Tensor, nn

from raybilevel import hypergradient_trainable
from raybilevel._config.experiment import ExperimentConfig, read_config
from raybilevel._config.plan import resolve, with_method
from raybilevel.errors import CheckpointError, ConfigError, NotFiniteError, ProblemError
from raybilevel.hypergradient import Hypergradient
from raybilevel.hypergradient._descent import BilevelDescent, dump_checkpoint, load_checkpoint
from raybilevel.methods import make_method
from raybilevel.methods._hypergradient import HypergradientDescent
from raybilevel.problem import Hyperparameters, LargeUpperLevel
from raybilevel.search_state import SearchState
from raybilevel.space import STARTS, Parameter, Space
from tests.problems_for_tests import Ridge, unit_box


class Decays(nn.Module):
    """Logarithms of the decays, one a weight."""

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.logs = nn.Parameter(torch.randn(dimension) / 10)


class ModuleRidge(LargeUpperLevel, Ridge):
    """The ridge with its decays in a module."""

    def upper_variables(self) -> nn.Module:
        return Decays(self.dimension)

    def decay(self, hyperparameters: Hyperparameters) -> Tensor:
        logs: Tensor = hyperparameters["upper"].logs
        return logs.exp()

    def evaluate(self, model: nn.Module, hyperparameters: Hyperparameters) -> dict[str, float]:
        return {"test_loss": float(hyperparameters["upper"].logs.sum())}


class ShardedRidge(ModuleRidge):
    """The ridge whose examples of either level can be divided."""

    def shard(self, index: int, count: int) -> ShardedRidge:
        other = copy.copy(self)
        other.lower, other.upper = (tuple(part[index::count] for part in level) for level in (self.lower, self.upper))
        return other


def run(descent: BilevelDescent) -> dict[str, Any]:
    while not descent.finished:
        descent.run_step()
    return descent.conclude()


def optimum(problem: Ridge) -> float:
    """The lowest F(y*(x)) over the box, by L-BFGS on the dense solution from several starts."""
    best = float("inf")
    for seed in range(4):
        z = torch.randn(problem.dimension, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
        z.requires_grad_(True)
        lbfgs = torch.optim.LBFGS([z], max_iter=200, line_search_fn="strong_wolfe")

        def closure(z: Tensor = z, lbfgs: torch.optim.LBFGS = lbfgs) -> Tensor:
            lbfgs.zero_grad()
            loss = problem.reduced(torch.sigmoid(z))
            loss.backward()
            return loss

        lbfgs.step(closure)
        best = min(best, problem.reduced(torch.sigmoid(z)).item())
    return best


@pytest.mark.parametrize(
    "settings",
    [
        {"lower": "tolerance", "lower_tolerance": 1e-8},
        {"lower": "optimizer"},
        {"lower": "tolerance", "lower_tolerance": 1e-8, "solver": "cg"},
        {"lower": "tolerance", "estimator": "unrolled", "estimator_settings": {"steps": 20, "rate": 0.3}},
    ],
)
def test_a_descent_finds_the_optimum_of_the_box(settings: dict[str, Any]) -> None:
    problem = Ridge()
    method = HypergradientDescent(steps=80, rate=0.1, **settings)
    centre = problem.space.to_config(torch.full((3,), 0.5, dtype=torch.double))
    descent = BilevelDescent(problem, centre, method, problem.space)
    start = problem.reduced(torch.full((3,), 0.5, dtype=torch.double)).item()
    found, best = run(descent), optimum(problem)
    # of what there is to gain: the rate falls to a tenth only
    assert found["upper_loss"] - best <= 0.02 * (start - best)
    x = torch.tensor([found["hyperparameters"]["decay"][str(j)] for j in range(3)], dtype=torch.double)
    assert found["upper_loss"] == pytest.approx(problem.F(problem.solution(x)).item(), rel=1e-6)


def test_steps_of_a_box_are_applied_before_the_result_is_judged() -> None:
    problem = Ridge()
    space = Space(tuple(Parameter(("decay", str(j)), 0.0, 2.0, step=0.5) for j in range(3)))
    method = HypergradientDescent(steps=3, rate=0.1, lower="tolerance", lower_tolerance=1e-8)
    descent = BilevelDescent(problem, problem.config(torch.ones(3)), method, space)
    found = run(descent)
    x = torch.tensor([found["hyperparameters"]["decay"][str(j)] for j in range(3)], dtype=torch.double)
    assert torch.equal(x, (2 * x).round() / 2) and not torch.equal(descent.best[1], space.encode(problem.config(x)))
    assert found["upper_loss"] == pytest.approx(problem.F(problem.solution(x)).item(), rel=1e-6)


def test_a_module_is_tuned_as_the_box_is() -> None:
    problem = ModuleRidge()
    descent = BilevelDescent(problem, {"start": 0.0}, HypergradientDescent(steps=100, rate=0.3, lower="tolerance"))
    found = run(descent)
    logs = load_checkpoint(dump_checkpoint(descent))["upper"]["logs"]
    assert found["test_loss"] == pytest.approx(float(logs.sum()))
    assert found["upper_loss"] == pytest.approx(problem.F(problem.solution(logs.exp())).item(), rel=1e-6)
    assert found["upper_loss"] <= optimum(problem) * 1.02
    other = BilevelDescent(problem, {"start": 1.0}, HypergradientDescent())
    again = BilevelDescent(problem, {"start": 0.0}, HypergradientDescent())
    assert not torch.equal(other.x, again.x)


@pytest.mark.parametrize("estimator", ["first_order", "dynamic_barrier"])
def test_the_result_is_judged_at_weights_that_saw_training_data_only(estimator: Any) -> None:
    """A penalty estimator's own weights have seen validation data; neither its reports nor its result may show them."""
    problem = ModuleRidge()
    method = HypergradientDescent(
        steps=5, estimator=estimator, estimator_settings={"steps": 30}, lower="tolerance", lower_tolerance=1e-9
    )
    descent = BilevelDescent(problem, {"start": 0.0}, method)
    while not descent.finished:
        x = descent.x.detach().clone()
        reported = descent.run_step()["upper_loss"]
        assert reported == pytest.approx(problem.F(problem.solution(x.exp())).item(), rel=1e-6)
    best = descent.best[1]
    assert descent.conclude()["upper_loss"] == pytest.approx(problem.F(problem.solution(best.exp())).item(), rel=1e-6)


@pytest.mark.parametrize(
    ("dimension", "curvature", "solver", "residual"),
    [(3, -100.0, "cg", 1.0), (3, -100.0, "minres", 0.0), (6, 0.0, "minres", 0.8), (3, 0.0, "cg", 0.0)],
)
def test_a_linear_solve_that_fails_is_reported_and_warned_of_once(
    dimension: int, curvature: float, solver: Any, residual: float, caplog: pytest.LogCaptureFixture
) -> None:
    """An indefinite Hessian, and one with two examples for six weights, whose equations have no solution."""

    class Curved(ModuleRidge):
        def decay(self, hyperparameters: Hyperparameters) -> Tensor:
            return curvature + 0 * super().decay(hyperparameters)

    method = HypergradientDescent(steps=2, solver=solver)
    descent = BilevelDescent(Curved(dimension, rows=2 if dimension == 6 else 4), {"start": 0.0}, method)
    descent._train = lambda *_: (torch.ones(dimension, dtype=torch.double), None)  # type: ignore[method-assign]
    for _ in range(2):
        assert descent.run_step()["solver_residual"] == pytest.approx(residual, abs=0.2)
    assert len(caplog.messages) == (1 if residual > 0.5 else 0)
    assert all("step 1" in message and "decay" in message for message in caplog.messages)


def test_a_residual_that_may_leave_half_an_error_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    """0.15 did, at a condition of 1e8."""
    descent = BilevelDescent(ModuleRidge(), {"start": 0.0}, HypergradientDescent(steps=1))
    for residual, warnings in ((0.09, 0), (0.15, 1)):
        descent._warn_of_failed_solve(Hypergradient(torch.zeros(1), 0.0, residual=residual), target=0.0)
        assert len(caplog.messages) == warnings


def test_a_descent_says_how_well_its_lower_level_was_solved() -> None:
    class Steep(ModuleRidge):
        """In units in which the rounding of df/dy is above the tolerance."""

        def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Any) -> Tensor:
            return super().lower_loss(model, hyperparameters, batch) * 1e9

    method = HypergradientDescent(steps=1, lower="tolerance", lower_tolerance=1e-8)
    for problem, solved in ((ModuleRidge(), True), (Steep(), False)):
        descent = BilevelDescent(problem, {"start": 0.0}, method)
        assert (descent.run_step()["lower_gradient_norm"] <= 1e-8) is solved
        assert (descent.conclude()["lower_gradient_norm"] <= 1e-8) is solved


def test_a_selection_loss_chooses_among_the_x_on_the_way() -> None:
    """F falls at every step; the selection loss does so for two steps only."""

    class Held(ModuleRidge):
        seen: ClassVar[list[Tensor]] = []

        def selection_loss(self, model: nn.Module, hyperparameters: Hyperparameters) -> float:
            self.seen.append(hyperparameters["upper"].logs.detach().clone())
            return float(abs(len(self.seen) - 3))

    Held.seen.clear()
    descent = BilevelDescent(Held(), {"start": 0.0}, HypergradientDescent(steps=5, rate=0.1, lower="tolerance"))
    reports = [descent.run_step() for _ in range(5)]
    assert [report["selection_loss"] for report in reports] == [2, 1, 0, 1, 2]
    losses = [report["upper_loss"] for report in reports]
    assert losses == sorted(losses, reverse=True)
    assert torch.equal(descent.best[1], Held.seen[2])
    found = descent.conclude()
    assert found["upper_loss"] == pytest.approx(losses[2], rel=1e-4)


@pytest.mark.parametrize("at", [1, 3])
@pytest.mark.parametrize(
    "settings",
    [
        {"solver_settings": {"selection": {"strategy": "ritz", "dimension": 2}}},
        {
            "solver_settings": {
                "criterion": "error",
                "selection": {"strategy": "ritz_generalized_singular", "end": "largest", "dimension": 1},
            }
        },
        {"estimator": "first_order"},
        {"lower": "tolerance"},
    ],
)
def test_a_descent_resumes_exactly(at: int, settings: dict[str, Any]) -> None:
    class Shuffled(ModuleRidge):
        def __init__(self) -> None:
            super().__init__(batch=5, optimizer=lambda m: torch.optim.Adam(m.parameters(), lr=0.05), epochs=3)

    method = HypergradientDescent(steps=5, **settings)
    whole = BilevelDescent(Shuffled(), {"start": 3.0}, method)
    expected = run(whole)
    first = BilevelDescent(Shuffled(), {"start": 3.0}, method)
    for _ in range(at):
        first.run_step()
    second = BilevelDescent(Shuffled(), {"start": 3.0}, method)
    second.load_state_dict(load_checkpoint(dump_checkpoint(first)))
    assert run(second) == expected
    assert second.products == whole.products and second.passes == whole.passes


@pytest.mark.parametrize("estimator", ["implicit", "first_order", "dynamic_barrier"])
def test_what_an_estimator_keeps_goes_to_the_problems_device(estimator: Any) -> None:
    """Shown by the precision, which is set together with the device."""
    method = HypergradientDescent(estimator=estimator, lower="tolerance", lower_tolerance=1e-3)
    double = BilevelDescent(ModuleRidge(), {"start": 0.0}, method)
    double.run_step()
    problem = ModuleRidge(dtype=torch.float32)
    single = BilevelDescent(problem, {"start": 0.0}, method)
    single.load_state_dict(load_checkpoint(dump_checkpoint(double)))
    single.run_step()
    memory = single.memory.solution if estimator == "implicit" else single.memory
    assert {t.dtype for t in (memory if isinstance(memory, tuple) else (memory,)) if isinstance(t, Tensor)} == {
        torch.float32
    }


def test_shards_are_parts_of_the_data_and_all_of_it_judges() -> None:
    problem = ShardedRidge(rows=24)
    method = HypergradientDescent(steps=30, rate=0.3, lower="tolerance", lower_tolerance=1e-8, shards=2)
    descents = [BilevelDescent(problem, {"start": float(start)}, method) for start in range(4)]
    assert torch.equal(descents[0].x, descents[1].x) and torch.equal(descents[2].x, descents[3].x)
    assert not torch.equal(descents[0].x, descents[2].x)
    for number, descent in enumerate(descents[:2]):
        part = problem.shard(number, 2)
        while not descent.finished:
            x = descent.x.detach().clone()
            assert descent.run_step()["upper_loss"] == pytest.approx(part.F(part.solution(x.exp())).item(), rel=1e-6)
        spent = descent.levels.passes
        assert descent.passes == spent / 2  # in passes over all data
        best = descent.best[1]
        found = descent.conclude()
        assert found["upper_loss"] == pytest.approx(problem.F(problem.solution(best.exp())).item(), rel=1e-6)
        assert spent / 2 < descent.passes < spent
        again = BilevelDescent(problem, {"start": float(number)}, method)
        again.load_state_dict(load_checkpoint(dump_checkpoint(descent)))
        assert again.finished and again.passes == descent.passes and again.conclude() == found
    assert not torch.allclose(descents[0].x, descents[1].x, atol=0.1)


def test_shards_are_refused_where_there_are_none() -> None:
    method = HypergradientDescent(shards=2)
    with pytest.raises(ProblemError, match="has no shard"):
        hypergradient_trainable(ModuleRidge(), method)
    with pytest.raises(ProblemError, match="all data"):
        hypergradient_trainable(ShardedRidge(), method, space={"decay": {"0": tune.loguniform(1e-3, 1.0)}})
    hypergradient_trainable(ShardedRidge(), method)
    search = {"trainings": 2, "method": "hypergradient", "settings": {"shards": 2}}
    config = ExperimentConfig.model_validate(
        {"problem": "treatment_effects", "options": {"units": 50}, "search": search}
    )
    with pytest.raises(ProblemError, match="TreatmentEffects has no shard"):
        resolve(config)


def test_damaged_checkpoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot read"):
        load_checkpoint(b"no checkpoint")
    path = tmp_path / "other.pt"
    torch.save({"format": 99}, path)
    with pytest.raises(CheckpointError, match="format 99"):
        load_checkpoint(path)


def test_a_training_that_diverges_is_an_error() -> None:
    problem = ModuleRidge(optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=1e6), epochs=100)
    with pytest.raises(NotFiniteError):
        BilevelDescent(problem, {"start": 0.0}, HypergradientDescent()).run_step()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"estimator": "magic"}, "unknown estimator"),
        ({"solver": "magic"}, "unknown solver"),
        ({"solver_settings": {"tol": 1}}, "no setting 'tol'"),
        ({"solver_settings": {"selection": {"dim": 1}}}, "no setting 'dim'"),
        ({"estimator": "unrolled", "estimator_settings": {"solver": 1}}, "no setting 'solver'"),
        ({"lower": "magic"}, "lower must be"),
        ({"steps": 0}, "at least 1"),
        ({"shards": 0}, "at least 1"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_method("hypergradient", **settings)


def test_the_method_starts_at_the_centre_and_plans_nothing() -> None:
    method = HypergradientDescent()
    design = method.start_design(unit_box(3), 2, 0)
    assert design[0].tolist() == [0.5] * 3 and len({tuple(row) for row in design.tolist()}) == len(design)
    assert method.upper_steps is None and method.exhausted(SearchState())
    starts = [STARTS.to_config(unit) for unit in method.start_design(STARTS, 2, 0)]
    assert [config["start"] for config in starts[:3]] == [0.0, 1.0, 2.0] and len(starts) == 512


def test_the_method_is_chosen_by_the_upper_level(tmp_path: Path) -> None:
    def chosen(text: str) -> str:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return with_method(read_config(path)).search.method

    many = ", ".join(f"h{i}: {{uniform: [0, 1]}}" for i in range(101))
    assert chosen("problem: p\nsearch: {trainings: 2}") == "hypergradient"
    assert chosen("problem: p\nspace: {a: {uniform: [0, 1]}}\nsearch: {trainings: 2}") == "default"
    assert chosen(f"problem: p\nspace: {{{many}}}\nsearch: {{trainings: 2}}") == "hypergradient"
    assert chosen(f"problem: p\nspace: {{{many}}}\nsearch: {{trainings: 2, method: paper}}") == "paper"
