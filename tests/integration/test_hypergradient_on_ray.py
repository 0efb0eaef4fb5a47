"""Descents along hypergradients as real trials on a real local Ray, and from the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ray import tune

from raybilevel import BilevelSearch, hypergradient_trainable, problems
from raybilevel._command.experiment import run
from raybilevel._config.experiment import ExperimentConfig
from raybilevel.errors import ProblemError
from raybilevel.hypergradient._descent import CHECKPOINT_FILE, load_checkpoint
from raybilevel.methods._hypergradient import HypergradientDescent
from tests.tiny_problems import ManyParabolas, Parabola

pytestmark = pytest.mark.usefixtures("local_ray")

METHOD = HypergradientDescent(steps=25, rate=0.2, lower="tolerance", lower_tolerance=1e-8)


def test_starts_are_trials_and_x_is_in_their_checkpoints(tmp_path: Path) -> None:
    problem = ManyParabolas(200)
    results = tune.Tuner(
        tune.with_resources(hypergradient_trainable(problem, METHOD), {"cpu": 1}),
        param_space={"start": tune.quniform(0, 65535, 1), "note": "kept"},
        tune_config=tune.TuneConfig(
            search_alg=BilevelSearch(problem, method=METHOD, max_concurrent=1),
            metric="upper_loss", mode="min", num_samples=2, reuse_actors=True,
        ),
        run_config=tune.RunConfig(name="run", storage_path=str(tmp_path), verbose=0),
    ).fit()  # fmt: skip
    assert not results.errors
    configs = [result.config for result in results]
    assert sorted(config["start"] for config in configs) == [0.0, 1.0]
    assert all(config["note"] == "kept" and len(config) == 2 for config in configs)
    best = results.get_best_result()
    assert best.metrics["upper_loss"] < 0.05  # of about 1 at the start
    assert best.metrics["step"] == 25 and best.metrics["lower_level_finished"]
    with best.checkpoint.as_directory() as folder:
        state = load_checkpoint(Path(folder) / CHECKPOINT_FILE)
    assert state["upper"]["values"].shape == (200,)
    # y*(x) = x: F is that of the x in the checkpoint
    expected = (state["upper"]["values"] - 1).square().mean().item()
    assert best.metrics["upper_loss"] == pytest.approx(expected, rel=1e-4)


def test_a_run_of_a_box_reports_where_descents_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(problems.PROBLEMS, "parabola", Parabola)
    settings = {"steps": 25, "rate": 0.1, "lower": "tolerance", "lower_tolerance": 1e-8}
    config = ExperimentConfig.model_validate(
        {
            "problem": "parabola",
            "space": {"x": {"a": {"loguniform": [1e-4, 1e2]}}},
            "search": {"trainings": 2, "method": "hypergradient", "settings": settings, "max_concurrent": 1},
        }
    )
    summary = run(config, tmp_path / "out")
    assert summary["trainings"] == 2 and summary["failed_trainings"] == 0 and summary["upper_steps"] == 0
    assert summary["best"]["upper_loss"] < 1e-2
    assert summary["best"]["hyperparameters"]["x"]["a"] == pytest.approx(0.1, rel=0.3)
    assert summary["metrics"]["test_loss"] == pytest.approx(summary["best"]["test_loss"])
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary
    assert Path(summary["best"]["checkpoint"], CHECKPOINT_FILE).is_file()


def test_a_problem_without_a_large_upper_level_is_refused() -> None:
    with pytest.raises(ProblemError, match="upper_variables"):
        hypergradient_trainable(Parabola())
    with pytest.raises(ProblemError, match="no hyperparameter"):
        BilevelSearch(Parabola(), space={"start": tune.quniform(0, 65535, 1)}, method=METHOD)


def test_the_core_of_hypergradients_knows_no_ray() -> None:
    code = (
        "import sys, types, importlib.util\n"
        "package = types.ModuleType('raybilevel')\n"
        "package.__path__ = list(importlib.util.find_spec('raybilevel').submodule_search_locations)\n"
        "sys.modules['raybilevel'] = package\n"
        "import raybilevel.hypergradient._descent, raybilevel.methods._hypergradient\n"
        "assert 'ray' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert torch.is_grad_enabled()
