"""Trainings on several workers of Ray Train, which talk by gloo."""

from __future__ import annotations

import importlib.util
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ray import tune
from ray.train import ScalingConfig
from torch import Tensor, nn

from raybilevel import BilevelProblem, BilevelSearch
from raybilevel._lower.training import train
from raybilevel.errors import ProblemError
from raybilevel.problem import minibatches
from raybilevel.tune._data_parallel import Shares, data_parallel_trainable
from tests.cluster.faulty_problems import enter
from tests.cluster.runs import fit

ROOT = Path(__file__).parents[2]
WORKERS = ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1})


class Regression(BilevelProblem):
    """Batches of 7, 7, 7, 7 and 3 examples: two workers never have equal shares."""

    epochs = 3
    dtype = torch.double

    def __init__(self, folder: str | None = None) -> None:
        self.folder, self.made_in = folder, os.getpid()
        chance = torch.Generator().manual_seed(0)
        self.data = {
            level: (torch.randn(31, 4, generator=chance).double(), torch.randn(31, 1, generator=chance).double())
            for level in ("lower", "upper")
        }

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))

    def lower_loss(self, model: Any, hyperparameters: Any, batch: Any) -> Tensor:
        x, y = batch
        return (model(x) - y).square().mean() + hyperparameters["x"]["a"] * model[0].weight.square().sum()

    def upper_loss(self, model: Any, batch: Any) -> Tensor:
        x, y = batch
        return (model(x) - y).square().mean()

    def batches(self, level: Any, generator: Any) -> Iterator[Any]:
        # A pass of a training: the third of both workers, in the second epoch, ends one of them, once Ray Train knows
        # of the first epoch's checkpoint.
        # The driver checks the problem, and trains nothing.
        training = generator is not None and os.getpid() != self.made_in
        if self.folder is not None and training and enter(self.folder, "pass") == 2:
            while not list(Path(self.folder).rglob("checkpoint_manager_snapshot.json")):
                time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGKILL)
        return minibatches(self.data[level], 7, generator)

    def evaluate(self, model: Any) -> dict[str, float]:
        return {"norm": sum(float(parameter.square().sum()) for parameter in model.parameters())}


def test_shares_of_the_workers_make_up_the_batch() -> None:
    problem = Regression()
    own = [Shares(problem, rank, 3, {}) for rank in range(3)]
    whole = list(problem.batches("lower", None))
    parts = [list(shares.batches("lower", None)) for shares in own]
    for number, (x, y) in enumerate(whole):
        for rank in range(3):
            torch.testing.assert_close(parts[rank][number], (x[rank::3], y[rank::3]))
        assert sum(len(parts[rank][number][0]) for rank in range(3)) == len(x)
    with pytest.raises(ProblemError, match="3 examples cannot be split among 4"):
        list(Shares(problem, 0, 4, {}).batches("lower", None))


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_two_workers_train_what_one_process_trains(tmp_path: Path) -> None:
    problem = Regression()
    search = BilevelSearch(problem, max_concurrent=1)
    results = fit(data_parallel_trainable(problem, WORKERS), search, tmp_path, 5)
    assert not results.errors
    assert len(search.state.done) == 5
    assert any(not step.failed for step in search.state.steps)  # a step read a checkpoint
    for result in results:
        alone, _ = train(problem, {"x": result.config["x"]})
        assert result.metrics["training_iteration"] == problem.epochs
        assert result.metrics["lower_loss"] == pytest.approx(alone.lower_loss, rel=1e-9)
        assert result.metrics["upper_loss"] == pytest.approx(alone.upper_loss, rel=1e-9)
        assert result.metrics["norm"] == pytest.approx(alone.metrics["norm"], rel=1e-9)
        assert result.metrics["lower_gradient"]["x"]["a"] == pytest.approx(alone.lower_gradient["x"]["a"], rel=1e-9)
        assert result.checkpoint is not None


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_training_whose_worker_is_killed_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    problem = Regression(str(tmp_path))
    search = BilevelSearch(problem, max_concurrent=1)
    trainable = data_parallel_trainable(problem, WORKERS, checkpoint_every=1)
    (result,) = fit(trainable, search, tmp_path, 1, failure_config=tune.FailureConfig(max_failures=1))
    assert result.error is None
    alone, _ = train(Regression(), {"x": result.config["x"]})
    assert result.metrics["upper_loss"] == pytest.approx(alone.upper_loss, rel=1e-9)
    # Two workers, three epochs; only the second one was begun twice.
    assert len(list(tmp_path.glob("pass *"))) == 2 * problem.epochs + 2


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_the_example_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # Tune's results
    spec = importlib.util.spec_from_file_location("data_parallel_example", ROOT / "examples" / "data_parallel.py")
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    results = example.main(samples=2)
    assert len(results) == 2
    assert not results.errors
