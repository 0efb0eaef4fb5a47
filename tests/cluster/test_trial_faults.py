"""Faults of trials and of the storage on a real Ray: counted, survived, and nothing that was observed is lost."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ray import tune

from raybilevel import BilevelSearch, lower_level_trainable, state_file
from raybilevel.errors import ConfigError
from raybilevel.snapshot import prepare_resume
from raybilevel.storage import local_filesystem
from raybilevel.time_limit import time_limit
from tests.cluster.faulty_problems import FAULTS, HANGS, Faulty
from tests.cluster.runs import fit
from tests.tiny_problems import Parabola

pytestmark = pytest.mark.usefixtures("local_ray")

ROOT = Path(__file__).parents[2]


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
def test_after_a_storage_has_vanished_the_run_goes_on_when_it_is_back(tmp_path: Path) -> None:
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        pytest.skip("mounting a folder needs root on Linux")
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
        assert "upper-level steps in a row failed" in str(error) and "cannot read the checkpoint" in str(error)  # noqa: PT017
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
