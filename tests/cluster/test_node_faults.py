"""Faults of nodes and drivers on clusters of several nodes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.fs
import pytest
import ray
from fsspec.implementations.memory import MemoryFileSystem
from ray import tune
from ray.cluster_utils import Cluster

from raybilevel import BilevelSearch, lower_level_trainable
from raybilevel._cluster import step_dispatch
from raybilevel._cluster.shared import Shared
from raybilevel._cluster.step_call import SharedBySteps, StepCall
from raybilevel._cluster.step_dispatch import NO_RESOURCES, StepDispatch
from raybilevel._cluster.storage import Storage, check_access, locate
from raybilevel.errors import StorageError
from raybilevel.methods._base import UpperResult, UpperStep
from raybilevel.methods._default import Default
from raybilevel.search_state import SearchState, StepRecord
from raybilevel.space import STARTS
from tests.cluster.faulty_problems import Slow
from tests.cluster.runs import fit

ROOT = Path(__file__).parents[2]


class Failures(tune.Callback):
    """The trials that failed and were begun again, in order."""

    def __init__(self) -> None:
        self.trials: list[str] = []

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.trials.append(trial.trial_id)


def wait_for(path: Path, seconds: float = 500) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path.name} did not happen"
        time.sleep(0.05)


@pytest.mark.slow
def test_a_node_lost_in_trainings_and_in_a_step_costs_no_observation(cluster: Cluster, tmp_path: Path) -> None:
    added = [cluster.add_node(num_cpus=1, resources={"training": 1, "step": 1}) for _ in range(4)]
    nodes = {node.node_id: node for node in added}
    ray.init(address=cluster.address, log_to_driver=False)
    problem = Slow(str(tmp_path), lost_at=12, step_seconds=120)
    method = Default(upper_share=2.0)  # trainings of eight epochs are else too short for a step that differentiates
    search = BilevelSearch(problem, method=method, max_concurrent=2, upper_resources={"step": 1})
    trainable = tune.with_resources(lower_level_trainable(problem, checkpoint_every=1), {"cpu": 1, "training": 1})
    lost: list[str] = []

    def lose_nodes() -> None:
        """One in the middle of a training, then one in the middle of an upper-level step."""
        wait_for(tmp_path / "training is on")
        cluster.remove_node(nodes.pop((tmp_path / "training is on").read_text()), allow_graceful=False)
        lost.append("training")
        (tmp_path / "go").touch()
        wait_for(tmp_path / "step is on")
        cluster.remove_node(nodes.pop((tmp_path / "step is on").read_text()), allow_graceful=False)
        lost.append("step")

    losing = threading.Thread(target=lose_nodes)
    losing.start()
    failures = Failures()
    results = fit(
        trainable, search, tmp_path, 9, failure_config=tune.FailureConfig(max_failures=-1), callbacks=[failures]
    )
    losing.join(60)
    assert lost == ["training", "step"]
    assert failures.trials  # the first node took a training along
    assert len(results) == 9
    assert not results.errors
    assert [t.status for t in search.state.trainings] == ["done"] * 9
    assert len({t.unit for t in search.state.trainings}) == 9
    assert not any(step.failed for step in search.state.steps)  # begun again elsewhere
    # A node that does not answer is noticed within seconds: the step alone would have slept for two minutes.
    passes = len(list(tmp_path.glob("pass *")))
    again = passes - 9 * problem.epochs
    assert 0 <= again <= 2 * len(failures.trials)  # at most the epoch under way and the one not yet reported


@dataclass(frozen=True)
class Waits(Default):
    """A step says on which node it is and waits for the file "go"."""

    folder: str = ""

    def run(self, problem: Any, space: Any, constants: Any, step: UpperStep, load: Any, memory: Any = None) -> Any:
        node = ray.get_runtime_context().get_node_id()
        Path(self.folder, f"step {step.number} on {node}").touch()
        while not Path(self.folder, "go").exists():
            time.sleep(0.05)
        return UpperResult(StepRecord(step.number, 0, 0.0), None, memory=node.encode())


@pytest.mark.slow
def test_steps_go_on_elsewhere_when_the_node_of_their_processes_is_lost(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps that ask for no resources have processes of their own, on any node."""
    monkeypatch.setattr(step_dispatch, "WORKER_START_S", 0.0)  # none waits for another
    nodes = {node.node_id: node for node in (cluster.add_node(num_cpus=1) for _ in range(3))}
    ray.init(address=cluster.address, log_to_driver=False)
    dispatch, count = StepDispatch(), 6
    shared = ray.put(SharedBySteps(Shared(Slow(str(tmp_path))), STARTS, {}, Waits(folder=str(tmp_path)), None))

    def begun(without: str = "") -> dict[int, str]:
        """The nodes that steps have begun on, by their numbers."""
        words = [path.name.split() for path in tmp_path.glob("step *")]
        return {int(number): node for _, number, _, node in words if node != without}

    for number in range(count):
        dispatch.begin(
            NO_RESOURCES, StepCall(UpperStep(number, "fill", 0, SearchState(), 0), {}, None, None), shared, []
        )
    deadline = time.monotonic() + 240
    while len(begun()) < count:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert set(begun().values()) == set(nodes)  # and none on the head, which has no CPU
    lost = next(iter(nodes))
    cluster.remove_node(nodes[lost], allow_graceful=False)
    while len(begun(without=lost)) < count:
        assert time.monotonic() < deadline
        assert not dispatch.ended(timeout=0.2)
    (tmp_path / "go").touch()
    found: dict[int, Any] = {}
    while len(found) < count:
        assert time.monotonic() < deadline
        found.update(dispatch.ended(timeout=5))
    assert all(isinstance(one, UpperResult) for one in found.values()), found
    assert lost not in {one.memory.decode() for one in found.values()}
    dispatch.cancel()


class AddsNode(tune.Callback):
    """A node joins when the second training has ended; Tune calls this in the thread that may start processes."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster, self.ended = cluster, 0
        self.joined: list[str] = []

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self.ended += 1
        if self.ended == 2:
            self.joined.append(self.cluster.add_node(num_cpus=1).node_id)

    def __getstate__(self) -> dict[str, Any]:
        return {"cluster": None, "ended": 0, "joined": []}


@pytest.mark.slow
def test_a_node_that_joins_later_is_used(cluster: Cluster, tmp_path: Path) -> None:
    first = cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    # Trainings that are shorter than the start of a process end before the new node has one, and Tune goes on with
    # the process that has become free.
    problem = Slow(str(tmp_path), epoch_seconds=4.0)
    search, adds = BilevelSearch(problem), AddsNode(cluster)
    trainable = tune.with_resources(lower_level_trainable(problem), {"cpu": 1})
    results = fit(trainable, search, tmp_path, 7, callbacks=[adds])
    assert not results.errors
    assert {path.name.removeprefix("node ") for path in tmp_path.glob("node *")} == {first.node_id, *adds.joined}
    assert search._ready().slots == 2  # the search, too, counts on it


def test_storage_that_other_nodes_do_not_see_is_refused_before_anything_is_trained(
    cluster: Cluster, tmp_path: Path
) -> None:
    cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    check_access(locate(tmp_path / "shared"))
    assert not list((tmp_path / "shared").iterdir())
    with pytest.raises(StorageError, match=r"1 of the cluster's nodes.*all nodes mount"):
        check_access(Storage(pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(MemoryFileSystem())), "/here"))
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot write"):
        check_access(locate(tmp_path / "file" / "under"))
    with pytest.raises(StorageError, match="--storage"):
        locate("nowhere://bucket/run")


@pytest.mark.slow
def test_two_experiments_share_a_cluster(cluster: Cluster, tmp_path: Path) -> None:
    cluster.add_node(num_cpus=2)
    program = (
        "import sys, ray; from pathlib import Path; from rich.console import Console\n"
        "from raybilevel._command import experiment; from raybilevel._config.experiment import read_config\n"
        "config = read_config('configs/digits.yaml', ['search.trainings=8', 'options={train: 100, epochs: 4}',\n"
        "    'search.max_concurrent=1', 'search.seed=' + sys.argv[2]])\n"
        "experiment.run(config, Path(sys.argv[1]), address=sys.argv[3], console=Console(quiet=True))\n"
    )

    def start(name: str, seed: int) -> subprocess.Popen[bytes]:
        arguments = [sys.executable, "-c", program, str(tmp_path / name), str(seed), cluster.address]
        return subprocess.Popen(arguments, env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=ROOT)

    together = [start("a", 0), start("b", 1)]
    assert [process.wait(500) for process in together] == [0, 0]
    assert start("alone", 0).wait(500) == 0

    def history(name: str) -> list[tuple[Any, float]]:
        entries = json.loads((tmp_path / name / "summary.json").read_text())["history"]
        return [(entry["hyperparameters"], entry["upper_loss"]) for entry in entries]

    assert history("a") == history("alone")
    assert history("b") != history("a")


@pytest.mark.slow
def test_a_driver_killed_fifty_times_ends_with_the_same_observations(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    kills = os.environ.get("RAYBILEVEL_KILLS", "50")
    done = subprocess.run(
        [sys.executable, "-m", "tests.cluster.killed_often", str(tmp_path), kills, "30"],
        stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT, check=True,
    )  # fmt: skip
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["killed"] == int(kills)
    assert report["trials"] == report["observed"] == 30
    assert report["points_trained_twice"] == 0
    assert report["same_observations"]
    assert report["same_search"]
