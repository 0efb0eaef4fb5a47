"""Folds of a cross-validated training side by side, on a real local Ray."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
from ray import tune
from torch import nn

from raybilevel import BilevelSearch, CrossValidated, fold_parallel_trainable
from raybilevel._lower.training import train
from raybilevel.errors import ConfigError, ProblemError
from tests.unit.test_folds import EXAMPLES, Line

pytestmark = pytest.mark.usefixtures("local_ray")

SPACE = {"decay": {"a": tune.loguniform(1e-3, 10.0), "b": tune.loguniform(1e-3, 10.0)}}
PATIENCE = 100.0
"""Seconds for which a fold waits for another one."""


class Meeting(Line):
    """A fold whose first training ends only when the other one has begun, in another process."""

    def __init__(self, folder: Path, train: Any, held_out: Any) -> None:
        super().__init__(train, held_out)
        self.folder, self.name = folder, f"held-out-{int(held_out[0])}"

    def optimizer(self, model: nn.Module) -> Any:
        (self.folder / f"{self.name}-{os.getpid()}").touch()
        until = time.monotonic() + PATIENCE
        while len({path.name.rsplit("-", 1)[0] for path in self.folder.iterdir()}) < 2:
            if time.monotonic() > until:
                raise TimeoutError("no other fold has begun")
            time.sleep(0.05)
        return super().optimizer(model)


def test_folds_are_trained_at_the_same_time_with_the_result_of_one_after_the_other(tmp_path: Path) -> None:
    folder = tmp_path / "begun"
    folder.mkdir()
    problem = CrossValidated(lambda rows, held: Meeting(folder, rows, held), EXAMPLES, folds=2)
    search = BilevelSearch(problem, max_concurrent=1)
    results = tune.Tuner(
        fold_parallel_trainable(problem, {"cpu": 1}),
        param_space=SPACE,
        tune_config=tune.TuneConfig(
            search_alg=search, metric="upper_loss", mode="min", num_samples=5, reuse_actors=True
        ),
        run_config=tune.RunConfig(name="run", storage_path=str(tmp_path / "storage"), verbose=0),
    ).fit()
    assert not results.errors
    assert len({path.name.rsplit("-", 1)[1] for path in folder.iterdir()}) >= 2
    # Steps read the folds' weights and times as those of any other training.
    assert len(search.state.done) == 5 and any(t.hypergradient for t in search.state.done)
    for result in results:
        alone, _ = train(CrossValidated(Line, EXAMPLES, folds=2), result.config)
        assert result.metrics["upper_loss"] == pytest.approx(alone.upper_loss, rel=1e-9)
        assert result.metrics["lower_passes"] == pytest.approx(alone.passes)
        found = result.metrics["lower_gradient"]["decay"]
        assert found == pytest.approx(dict(alone.lower_gradient["decay"]), rel=1e-6)


class Failing(Line):
    def __init__(self, train: Any, held_out: Any) -> None:
        super().__init__(train, held_out)
        self.last = int(held_out[-1]) == EXAMPLES - 1

    def optimizer(self, model: nn.Module) -> Any:
        if self.last:
            raise ValueError("the last fold has no optimizer")
        return super().optimizer(model)


@pytest.mark.slow
def test_what_a_fold_raises_is_what_its_trial_raises(tmp_path: Path) -> None:
    problem = CrossValidated(Failing, EXAMPLES, folds=2)
    results = tune.Tuner(
        fold_parallel_trainable(problem, {"cpu": 1}),
        param_space={"decay": {"a": 0.1, "b": 0.1}},
        tune_config=tune.TuneConfig(metric="upper_loss", mode="min"),
        run_config=tune.RunConfig(name="run", storage_path=str(tmp_path), verbose=0),
    ).fit()
    assert "the last fold has no optimizer" in str(results.errors[0])
    # The first fold has been reported.
    assert results[0].metrics["upper_loss"] > 0


def test_what_it_cannot_train_is_refused() -> None:
    with pytest.raises(ProblemError, match="Line: fold_parallel_trainable takes a CrossValidated problem"):
        fold_parallel_trainable(Line([0, 1], [2]))  # type: ignore[arg-type]
    for wrong in (1, 4):
        with pytest.raises(ConfigError, match="at_once must be from 2 to the number of folds, 3, got"):
            fold_parallel_trainable(CrossValidated(Line, EXAMPLES, folds=3), at_once=wrong)
