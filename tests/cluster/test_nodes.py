"""Searches and comparisons on several nodes that nothing happens to."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import tune
from ray.cluster_utils import Cluster
from rich.console import Console

from raybilevel import BilevelSearch, lower_level_trainable
from raybilevel._compare.command import run_all
from raybilevel._compare.config import CompareConfig
from raybilevel._records import store as records
from raybilevel.errors import ConfigError
from tests.cluster.faulty_problems import enter
from tests.cluster.runs import SPACE, fit
from tests.tiny_problems import Parabola


class Counted(Parabola):
    """Leaves a file with the process's id wherever it is unpickled, trains, or is differentiated by a step."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = folder

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        enter(self.folder, f"unpickled in {os.getpid()}:")

    def model(self) -> Any:
        enter(self.folder, f"used in {os.getpid()} on {ray.get_runtime_context().get_node_id()}:")
        return super().model()


def counts(folder: Path, what: str) -> dict[int, int]:
    """How often it happened in each process."""
    found: dict[int, int] = {}
    for path in folder.glob(f"{what} in *"):
        process = int(path.name.split()[2].rstrip(":"))
        found[process] = found.get(process, 0) + 1
    return found


def test_a_training_of_two_bundles_spans_two_nodes_and_the_problem_reaches_a_process_once(
    cluster: Cluster, tmp_path: Path
) -> None:
    nodes = [cluster.add_node(num_cpus=1).node_id for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False)
    asked = tune.PlacementGroupFactory([{"CPU": 1}, {"CPU": 1}], strategy="STRICT_SPREAD")
    problem = Counted(str(tmp_path))
    search = BilevelSearch(problem, lower_resources=asked)
    results = fit(tune.with_resources(lower_level_trainable(problem), asked), search, tmp_path, 6)
    assert not results.errors
    assert search._ready().slots == 1  # both nodes are one training's
    assert len(search.state.done) == 6
    assert any(not step.failed for step in search.state.steps)
    used = {process: count for process, count in counts(tmp_path, "used").items() if process != os.getpid()}
    unpickled = counts(tmp_path, "unpickled")
    assert sum(used.values()) >= 6 + len(search.state.steps)
    assert len(used) < sum(used.values())  # some process ran several trainings or steps
    assert {process: unpickled[process] for process in used} == dict.fromkeys(used, 1)
    where = {path.name.split()[4].rstrip(":") for path in tmp_path.glob("used in *")}
    assert where - {ray.get_runtime_context().get_node_id()} <= set(nodes)


@pytest.mark.slow
def test_a_searcher_goes_on_in_another_run_after_another_start_of_ray(cluster: Cluster, tmp_path: Path) -> None:
    """Its processes and what it stored are gone; without a space in `param_space` Tune does not tell it."""
    cluster.add_node(num_cpus=1)
    search = BilevelSearch(Parabola(), space=SPACE, metric="upper_loss", mode="min", max_concurrent=1)
    for number in range(2):
        ray.init(address=cluster.address, log_to_driver=False)
        results = tune.Tuner(
            lower_level_trainable(search.problem),
            tune_config=tune.TuneConfig(search_alg=search, num_samples=5, reuse_actors=True),
            run_config=tune.RunConfig(name=f"run{number}", storage_path=str(tmp_path), verbose=0),
        ).fit()
        ray.shutdown()
        assert not results.errors
        assert len(search.state.done) == 5 * (number + 1)
    assert len(search.state.steps) > 5
    assert not any(step.failed for step in search.state.steps)


@pytest.mark.slow
def test_a_comparison_on_several_nodes_needs_a_storage_and_leaves_nothing_there(
    cluster: Cluster, tmp_path: Path
) -> None:
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    comparison = CompareConfig.model_validate(
        {
            "budget": {"trainings": 6}, "seeds": 1, "methods": ["raybilevel", "random"],
            "problems": {"digits": {"problem": "digits", "options": {"train": 100, "epochs": 6}, "space": {
                "weight_decay": {name: {"loguniform": [1e-3, 1e2]} for name in ("fc1", "fc2", "fc3")}
            }}},
        }
    )  # fmt: skip
    runs, quiet = comparison.runs(None), Console(quiet=True)
    with pytest.raises(ConfigError, match=r"several nodes.*--storage"):
        run_all(runs, tmp_path / "out", None, None, quiet)
    storage = tmp_path / "storage"
    assert run_all(runs, tmp_path / "out", None, None, quiet, str(storage)) == (0, False)
    for run in runs:
        record = records.read(tmp_path / "out" / run.path)
        assert record.status == "done"
        assert [o.status for o in record.observations].count("done") >= 4
    assert not list(storage.iterdir())
