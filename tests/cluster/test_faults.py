"""Faults of trials, nodes and storage on a real cluster: counted, survived, and nothing that was observed is lost."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pyarrow.fs
import pytest
import ray
from fsspec.implementations.memory import MemoryFileSystem
from ray import tune
from ray.cluster_utils import Cluster

from raybilevel import BilevelSearch, lower_level_trainable, state_file
from raybilevel.errors import ConfigError, StorageError
from raybilevel.snapshot import prepare_resume
from raybilevel.storage import local_filesystem
from raybilevel.storage_access import Storage, check_access, locate
from raybilevel.time_limit import time_limit
from tests.cluster.faulty_problems import FAULTS, Faulty, Slow
from tests.tiny_problems import Parabola

SPACE = {"x": {"a": tune.loguniform(1e-4, 1e2)}}
ROOT = Path(__file__).parents[2]


def fit(trainable: Any, search: BilevelSearch, folder: Path, samples: int, **run: Any) -> tune.ResultGrid:
    return tune.Tuner(
        trainable,
        param_space=SPACE,
        tune_config=tune.TuneConfig(
            search_alg=search, metric="upper_loss", mode="min", num_samples=samples, reuse_actors=True
        ),
        run_config=tune.RunConfig(
            name="run", storage_path=str(folder / "runs"), storage_filesystem=local_filesystem(), verbose=0, **run
        ),
    ).fit()


@pytest.mark.usefixtures("local_ray")
def test_trials_that_go_wrong_in_every_way_are_counted(tmp_path: Path) -> None:
    problem = Faulty(str(tmp_path))
    search = BilevelSearch(problem, max_concurrent=1)
    trainable = lower_level_trainable(problem, epoch_time_limit=5)
    results = fit(trainable, search, tmp_path, 17)
    happened = [fault for fault in FAULTS.values() if (tmp_path / f"{fault} 0").exists()]
    assert happened == list(FAULTS.values())
    assert len(results) == 17
    assert len(results.errors) == len(FAULTS)
    assert [t.status for t in search.state.trainings] == ["done", "failed"] * len(FAULTS) + ["done"]
    # What the others observed is all there, with its own point: at the minimiser of f, F = (log10 x + 1)^2.
    values = {result.config["x"]["a"]: result.metrics["upper_loss"] for result in results if not result.error}
    assert {search.config_of(t)["x"]["a"]: t.upper for t in search.state.done} == values
    assert not any(step.failed for step in search.state.steps)


def test_a_limit_ends_what_hangs_and_nothing_else() -> None:
    program = (
        "import time, sys; from raybilevel.time_limit import time_limit\n"
        "with time_limit(60): pass\n"
        "with time_limit(None): pass\n"
        "print('before', flush=True)\n"
        "with time_limit(0.2): time.sleep(60)\n"
        "print('after')"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1
    assert done.stdout == "before\n"
    assert "line 5 in <module>" in done.stderr  # where it hung
    with time_limit(60):
        pass
    with pytest.raises(ConfigError, match="epoch_time_limit"):
        lower_level_trainable(Parabola(), epoch_time_limit=0)
    with pytest.raises(ConfigError, match="step_time_limit"):
        BilevelSearch(Parabola(), step_time_limit=-1)


def wait_for(path: Path, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path.name} did not happen"
        time.sleep(0.05)


def test_a_node_lost_in_trainings_and_in_a_step_costs_no_observation(cluster: Cluster, tmp_path: Path) -> None:
    added = [cluster.add_node(num_cpus=1, resources={"training": 1, "step": 1}) for _ in range(4)]
    nodes = {node.node_id: node for node in added}
    ray.init(address=cluster.address, log_to_driver=False)
    problem = Slow(str(tmp_path), step_seconds=120)
    search = BilevelSearch(problem, max_concurrent=2, upper_resources={"step": 1})
    trainable = tune.with_resources(lower_level_trainable(problem, checkpoint_every=1), {"cpu": 1, "training": 1})
    lost: list[str] = []

    def lose_nodes() -> None:
        """One in the middle of a training, then one in the middle of an upper-level step."""
        wait_for(tmp_path / "pass 12")
        cluster.remove_node(nodes.pop((tmp_path / "training is on").read_text()), allow_graceful=False)
        lost.append("training")
        (tmp_path / "go").touch()
        wait_for(tmp_path / "step is on")
        cluster.remove_node(nodes.pop((tmp_path / "step is on").read_text()), allow_graceful=False)
        lost.append("step")

    losing = threading.Thread(target=lose_nodes)
    losing.start()
    results = fit(trainable, search, tmp_path, 9, failure_config=tune.FailureConfig(max_failures=-1))
    losing.join(1)
    assert lost == ["training", "step"]
    assert len(results) == 9
    assert not results.errors
    assert [t.status for t in search.state.trainings] == ["done"] * 9
    assert len({t.unit for t in search.state.trainings}) == 9
    assert not any(step.failed for step in search.state.steps)  # begun again elsewhere
    # A node that does not answer is noticed within seconds: the step alone would have slept for two minutes.
    passes = len(list(tmp_path.glob("pass *")))
    assert 9 * problem.epochs < passes <= 9 * problem.epochs + 4  # only the epochs under way were done again


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


class SpoilsTheStorage(tune.Callback):
    """When the fourth trial has ended, the disk under the storage is full or cannot be written any more."""

    def __init__(self, disk: Path, how: str) -> None:
        self.disk, self.how, self.ended = disk, how, 0

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self.ended += 1
        if self.ended == 4 and self.how == "full":
            with contextlib.suppress(OSError), open(self.disk / "ballast", "wb") as file:
                while True:
                    file.write(bytes(4096))
        if self.ended == 4 and self.how == "read-only":
            subprocess.run(["mount", "-o", "remount,ro", str(self.disk)], check=True)


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("how", ["full", "read-only"])
def test_a_spoilt_disk_keeps_its_last_good_state(how: str, tmp_path: Path) -> None:
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root on Linux")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], check=True)
    try:
        problem = Parabola()
        search = BilevelSearch(problem, max_concurrent=1)
        fit(lower_level_trainable(problem), search, disk, 8, callbacks=[SpoilsTheStorage(disk, how)])
        assert any(t.status == "failed" for t in search.state.trainings)
        assert len(search.state.done) >= 4
        if how == "full":
            (disk / "ballast").unlink()
        else:
            subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        run = disk / "runs" / "run"
        prepare_resume(local_filesystem(), str(run))
        results = tune.Tuner.restore(
            str(run), lower_level_trainable(problem), storage_filesystem=local_filesystem(), resume_errored=True
        ).fit()
        assert len(results) == 8
        assert not results.errors
        assert len({result.config["x"]["a"] for result in results}) == 8
        state = state_file.read(max(run.glob("searcher-state-*.pkl"))).state
        assert len(state.done) == 8
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.slow
def test_two_experiments_share_a_cluster(cluster: Cluster, tmp_path: Path) -> None:
    cluster.add_node(num_cpus=2)
    program = (
        "import sys, ray; from pathlib import Path; from rich.console import Console\n"
        "from raybilevel import experiment; from raybilevel.config import read_config\n"
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
    assert report["trials"] == report["observed"] == 30
    assert report["points_trained_twice"] == 0
    assert report["same_observations"]
    assert report["same_search"]
