"""Loops of the user's own on a real local Ray: a Tune function with one call at its end, and a problem that trains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ray import tune
from ray.tune.schedulers import ASHAScheduler

from raybilevel import BilevelSearch, conclude, lower_level_trainable
from raybilevel._lower.training import CHECKPOINT_FILE, load_checkpoint
from raybilevel.errors import ConfigError, ProblemError
from raybilevel.methods import Default
from tests.tiny_problems import OwnLoop, Parabola

pytestmark = pytest.mark.usefixtures("local_ray")

STEPS = 24  # long enough for hypergradients to pay
SPACE = {"x": {"a": tune.loguniform(1e-4, 1e2)}, "steps": STEPS}


def by_hand(config: dict[str, Any], problem: Parabola) -> None:
    """Half way to the minimiser of f in each step."""
    model = problem.model().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    given = {"x": {"a": torch.tensor(config["x"]["a"], dtype=torch.double)}}
    for step in range(config["steps"]):
        optimizer.zero_grad()
        problem.lower_loss(model, given, None).backward()
        optimizer.step()
        tune.report({"upper_loss": problem.upper_loss(model, None).item(), "step_of_mine": step})
    folder = Path("mine")
    folder.mkdir(exist_ok=True)
    (folder / "mine.txt").write_text("kept")
    checkpoint = tune.Checkpoint.from_directory(folder)
    conclude(problem, model, config, passes=STEPS, metrics={"last": step}, checkpoint=checkpoint)


def fit(trainable: Callable[..., Any], search: BilevelSearch, folder: Path, **options: Any) -> tune.ResultGrid:
    config = {"metric": "upper_loss", "mode": "min", "reuse_actors": True, "num_samples": 6, **options}
    return tune.Tuner(
        tune.with_resources(trainable, {"cpu": 1}),
        param_space=SPACE,
        tune_config=tune.TuneConfig(search_alg=search, **config),
        run_config=tune.RunConfig(
            name="run", storage_path=str(folder), verbose=0, failure_config=tune.FailureConfig(max_failures=1)
        ),
    ).fit()


def test_a_tune_function_with_one_call_at_its_end_is_searched_with_hypergradients(tmp_path: Path) -> None:
    problem = Parabola()
    search = BilevelSearch(problem, max_concurrent=2)
    results = fit(tune.with_parameters(by_hand, problem=problem), search, tmp_path)
    assert not results.errors
    assert any(training.hypergradient for training in search.state.trainings)
    assert {training.passes for training in search.state.done} == {STEPS + 1.0}
    best = results.get_best_result()
    assert best.metrics["upper_loss"] < 0.1  # about 1 at the centre
    assert best.metrics["lower_level_finished"] and best.metrics["last"] == STEPS - 1 and "test_loss" in best.metrics
    log = torch.tensor(best.config["x"]["a"]).log10()
    with best.checkpoint.as_directory() as folder:
        assert (Path(folder) / "mine.txt").read_text() == "kept"
        weight = load_checkpoint(Path(folder) / CHECKPOINT_FILE)["model"]["weight"]
    assert weight.item() == pytest.approx(log.item() * (1 - 0.5**STEPS), rel=1e-5)


def test_a_problem_that_trains_itself_goes_on_after_a_fault(tmp_path: Path) -> None:
    problem = OwnLoop(fault=3)
    # Four steps are else too short for hypergradients.
    search = BilevelSearch(problem, method=Default(upper_share=2.0), max_concurrent=2)
    results = fit(lower_level_trainable(problem), search, tmp_path, num_samples=4)
    assert not results.errors
    for result in results:
        assert result.metrics["lower_level_finished"]
        assert result.metrics["lower_passes"] == 5.0  # four steps, and df/dx
        assert result.metrics["training_iteration"] == 5  # reports, with the one of the end; none of them twice
    assert any(training.hypergradient for training in search.state.trainings)


def test_a_scheduler_stops_loops_of_ones_own(tmp_path: Path) -> None:
    problem = OwnLoop()
    search = BilevelSearch(problem, max_concurrent=2)
    scheduler = ASHAScheduler(max_t=5, grace_period=1, reduction_factor=4)
    results = fit(lower_level_trainable(problem), search, tmp_path, scheduler=scheduler)
    assert not results.errors
    assert "stopped" in {training.status for training in search.state.trainings}


def test_what_conclude_refuses() -> None:
    with pytest.raises(ProblemError, match="conclude: expected a BilevelProblem instance, got <class"):
        conclude(Parabola, None, {})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="passes must be a positive number of passes over the training data, got 0"):
        conclude(Parabola(), Parabola().model(), {}, passes=0)
