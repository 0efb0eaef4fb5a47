"""Faults of trials and of the storage on a real Ray: counted, survived, and nothing that was observed is lost."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from ray import tune

from raybilevel import BilevelSearch, hypergradient_trainable, lower_level_trainable
from raybilevel._cluster.local_files import local_filesystem
from raybilevel._cluster.time_limit import time_limit
from raybilevel.errors import ConfigError
from raybilevel.methods._hypergradient import HypergradientDescent
from raybilevel.search import _state_file as state_file
from raybilevel.tune._snapshot import prepare_resume
from tests.cluster.faulty_problems import FAULTS, HANGS, Faulty, enter
from tests.cluster.runs import SPACE, fit
from tests.integration.conftest import SOCKET_PATHS
from tests.tiny_problems import Parabola

pytestmark = pytest.mark.usefixtures("local_ray")

ROOT = Path(__file__).parents[2]


def needs_root(what: str) -> None:
    """Skipped without it, but where the cluster's tests were asked for."""
    if sys.platform.startswith("linux") and os.geteuid() == 0:
        return
    reason = f"{what} needs root on Linux"
    if os.environ.get("RAYBILEVEL_TEST_HOSTS"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.mark.slow
@pytest.mark.parametrize("faults", [FAULTS, HANGS], ids=["end", "hang"])
def test_trials_that_go_wrong_in_every_way_are_counted(faults: tuple[str, ...], tmp_path: Path) -> None:
    problem = Faulty(str(tmp_path), faults)
    search = BilevelSearch(problem, max_concurrent=1)
    samples = 2 * len(faults) + 1
    trainable = lower_level_trainable(problem, epoch_time_limit=60 if faults == HANGS else None)
    results = fit(trainable, search, tmp_path, samples)
    assert all((tmp_path / f"{fault} 0").exists() for fault in faults)
    assert len(results) == samples
    assert len(results.errors) == len(faults)
    assert [t.status for t in search.state.trainings] == ["done", "failed"] * len(faults) + ["done"]
    # What the others observed is all there, with its own point.
    values = {result.config["x"]["a"]: result.metrics["upper_loss"] for result in results if not result.error}
    assert {search.config_of(t)["x"]["a"]: t.upper_loss for t in search.state.done} == values
    assert not any(step.failed for step in search.state.steps)


def test_a_limit_ends_what_hangs_and_nothing_else() -> None:
    program = (
        "import time, sys; from raybilevel._cluster.time_limit import time_limit\n"
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


class HangingDescent(Parabola):
    """The first descent hangs in its first step."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder, self.made_in = folder, os.getpid()

    def batches(self, level: Any, generator: Any) -> Any:
        if generator is not None and os.getpid() != self.made_in and enter(self.folder, "pass") == 0:
            time.sleep(3600)
        return super().batches(level, generator)


@pytest.mark.slow
def test_a_descent_that_hangs_is_ended_at_its_limit(tmp_path: Path) -> None:
    problem, method = HangingDescent(str(tmp_path)), HypergradientDescent(steps=3, rate=0.1)
    trainable = hypergradient_trainable(problem, method, SPACE, epoch_time_limit=20)
    results = fit(trainable, BilevelSearch(problem, method=method, max_concurrent=1), tmp_path, 2)
    assert len(results) == 2
    assert len(results.errors) == 1
    with pytest.raises(ConfigError, match="epoch_time_limit"):
        hypergradient_trainable(problem, method, SPACE, epoch_time_limit=0)


class Hungry(Parabola):
    """The second training takes memory until it is ended for it, 3 GiB at the most; tried again, it does not."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder, self.made_in = folder, os.getpid()

    def batches(self, level: Any, generator: Any) -> Any:
        training = generator is not None and os.getpid() != self.made_in
        if training and enter(self.folder, "pass") == self.epochs:
            taken = []
            for _ in range(3 * 1024 // 64):
                taken.append(os.urandom(1 << 16) * 1024)  # 64 MiB that are really there
                time.sleep(0.1)
            time.sleep(600)
        return super().batches(level, generator)


RUNS_OUT_OF_MEMORY = """
import sys
from pathlib import Path
import ray
from ray import tune
from raybilevel import BilevelSearch, lower_level_trainable
from tests.cluster.runs import fit
from tests.cluster.test_trial_faults import Hungry

folder, ray_folder, tries = sys.argv[1:]
ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, _temp_dir=ray_folder)
problem = Hungry(folder)
search = BilevelSearch(problem, max_concurrent=1)
again = {"failure_config": tune.FailureConfig(max_failures=int(tries))} if int(tries) else {}
fit(lower_level_trainable(problem), search, Path(folder), 5, **again)
print([training.status for training in search.state.trainings])
"""


@pytest.mark.slow
@pytest.mark.parametrize(("tries", "status"), [(0, "failed"), (1, "done")])
def test_a_training_that_takes_all_memory_ends_alone(tries: int, status: str, tmp_path: Path) -> None:
    """Ray ends its process when the machine's memory is used up to a threshold, here 1.5 GiB more than is used now."""
    if not Path("/proc/meminfo").exists():
        pytest.skip("Ray watches the memory on Linux only")
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    total, available = (int(lines[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "RAY_memory_monitor_refresh_ms": "100",
        "RAY_memory_usage_threshold": f"{(total - available + 1.5 * 2**30) / total:.4f}",
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="rb", dir=SOCKET_PATHS, ignore_cleanup_errors=True) as folder:
        done = subprocess.run(
            [sys.executable, "-c", RUNS_OUT_OF_MEMORY, str(tmp_path), folder, str(tries)],
            capture_output=True, text=True, env=environment, cwd=ROOT, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "low on memory" in done.stderr
    assert done.stdout.splitlines()[-1] == str(["done", status, "done", "done", "done"])
    passes = len(list(tmp_path.glob("pass *")))
    assert passes > 5 * Hungry.epochs if tries else passes < 5 * Hungry.epochs


class SpoilsTheStorage(tune.Callback):
    """When the fourth trial has ended, the disk under the storage is full, cannot be written any more, or is gone.

    Once: a restored experiment has its callbacks again.
    """

    def __init__(self, disk: Path, how: str) -> None:
        self.disk, self.how, self.ended = disk, how, 0

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self.ended += 1
        once = self.disk.with_name("spoilt")
        if self.ended != 4 or once.exists():
            return
        once.touch()
        if self.how == "full":
            with contextlib.suppress(OSError), open(self.disk / "ballast", "wb") as file:
                while True:
                    file.write(bytes(4096))
        elif self.how == "read-only":
            subprocess.run(["mount", "-o", "remount,ro", str(self.disk)], check=True)
        else:
            subprocess.run(["umount", "-l", str(self.disk)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["full", "read-only"])
def test_a_spoilt_disk_keeps_its_last_good_state(how: str, tmp_path: Path) -> None:
    needs_root("mounting a small disk")
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
def test_after_a_storage_has_vanished_the_run_goes_on_when_it_is_back(tmp_path: Path) -> None:
    needs_root("mounting a folder")
    real, disk = tmp_path / "real", tmp_path / "disk"
    real.mkdir()
    disk.mkdir()
    mount = ["mount", "--bind", str(real), str(disk)]
    subprocess.run(mount, check=True)
    problem = Parabola()
    trainable = lower_level_trainable(problem)
    search = BilevelSearch(problem, max_concurrent=1)
    run = disk / "runs" / "run"
    try:  # what is trained meanwhile lies under the empty mount point, where some steps find it
        fit(trainable, search, disk, 12, callbacks=[SpoilsTheStorage(disk, "vanished")])
    except Exception as error:
        assert "in a row failed or found no checkpoint" in str(error) and "cannot read the checkpoint" in str(error)  # noqa: PT017
    before = {t.unit for t in search.state.done[:4]}
    subprocess.run(mount, check=True)
    try:
        prepare_resume(local_filesystem(), str(run))
        results = tune.Tuner.restore(
            str(run), trainable, storage_filesystem=local_filesystem(), resume_errored=True
        ).fit()
        assert len(results) == 12
        assert not results.errors
        state = state_file.read(max(run.glob("searcher-state-*.pkl"))).state
        assert len(state.done) == len({t.unit for t in state.done}) == 12
        assert before <= {t.unit for t in state.done}
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
