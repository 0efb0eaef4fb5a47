"""configs/cluster/slurm.sh under Slurm itself: a controller and two nodes, each a separate host.

`make test-cluster` runs it where Slurm is installed (on Debian and Ubuntu the package `slurm-wlm`); nothing of it need
be set up.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from raybilevel.tune._snapshot import EXPERIMENT_STATE, parse
from tests.cluster.hosts import Network, cannot, until
from tests.integration.conftest import SOCKET_PATHS

MISSING = [command for command in ("slurmctld", "slurmd", "sbatch", "sinfo") if shutil.which(command) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        "RAYBILEVEL_TEST_HOSTS" not in os.environ, reason="RAYBILEVEL_TEST_HOSTS is not set; make test-cluster does"
    ),
    pytest.mark.skipif(bool(MISSING), reason=f"Slurm is not installed: no {', '.join(MISSING)} (package slurm-wlm)"),
]

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "configs" / "cluster" / "slurm.sh"

SLURM = """
ClusterName=test
SlurmctldHost=host1({controller})
SlurmUser=root
AuthType=auth/none
CredType=cred/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
SlurmdParameters=config_overrides
ReturnToService=2
StateSaveLocation={disk}/state
SlurmdSpoolDir={disk}/spool
SlurmctldPidFile={disk}/slurmctld.pid
SlurmdPidFile={disk}/slurmd.pid
NodeName=host2 NodeAddr={first} CPUs=2 Gres=gpu:1
NodeName=host3 NodeAddr={second} CPUs=2 Gres=gpu:1
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
GPUS = "NodeName=host[2-3] Name=gpu File=/dev/null\n"

CONFIG = """
problem: digits
options: {train: 100}
space:
  weight_decay:
    fc1: {loguniform: [1.0e-3, 1.0e+2]}
    fc2: {loguniform: [1.0e-3, 1.0e+2]}
    fc3: {loguniform: [1.0e-3, 1.0e+2]}
search: {trainings: 8}
"""


@dataclass(frozen=True)
class Slurm:
    network: Network
    environment: dict[str, str]

    def call(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(words, capture_output=True, text=True, check=False, env=self.environment, cwd=ROOT)

    def submit(self, config: Path, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
        """The script on both nodes, with a core each."""
        given = ["--nodes=2", "--cpus-per-task=2", f"--output={self.log}", "--open-mode=append", *options]
        return self.call("sbatch", *given, str(SCRIPT), str(config), str(folder), "--set", "options.epochs=200")

    @property
    def log(self) -> Path:
        """Of the jobs."""
        return self.network.folder / "jobs.log"


@pytest.fixture
def slurm() -> Iterator[Slurm]:
    if (reason := cannot()) is not None:
        pytest.fail(reason)
    folder = Path(tempfile.mkdtemp(prefix="rb", dir=SOCKET_PATHS))
    (folder / "home").mkdir()
    try:
        with Network(folder) as network:
            settings = {
                "controller": network.address(1), "first": network.address(2), "second": network.address(3),
                "disk": network.disk,
            }  # fmt: skip
            (folder / "slurm.conf").write_text(SLURM.format(**settings))
            (folder / "gres.conf").write_text(GPUS)
            (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # of which nothing is used
            environment = {
                "HOME": str(folder / "home"),
                "OMP_NUM_THREADS": "1",
                "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
                "PYTHONPATH": str(ROOT),
                "RAY_TMPDIR": str(network.disk),
                "RAY_USAGE_STATS_ENABLED": "0",
                "SLURM_CONF": str(folder / "slurm.conf"),
            }
            for daemon in ("slurmctld", "slurmd", "slurmd"):
                begin = f"mkdir -p state spool && exec {shutil.which(daemon)} -D"
                network.add(["sh", "-c", begin], environment)
            slurm = Slurm(network, environment)

            def both_idle() -> bool:
                for host in network.hosts:
                    assert host.process.poll() is None, host.log.read_text()[-3000:]
                return slurm.call("sinfo", "--noheader", "--states=idle", "--format=%D").stdout.strip() == "2"

            until(both_idle, "both nodes are idle", network.hosts[0].log, seconds=60)
            yield slurm
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_the_script_runs_on_both_nodes_and_goes_on_when_it_is_submitted_again(slurm: Slurm) -> None:
    shared = slurm.network.folder  # as a file system that all nodes mount
    config, folder = shared / "digits.yaml", shared / "runs"
    config.write_text(CONFIG)

    def ended() -> dict[str, str]:
        """Trainings, by the trial: where they ran."""
        snapshots = sorted((folder / "tune").glob(f"{EXPERIMENT_STATE}*.json"))
        trials = parse(snapshots[-1].read_text()) if snapshots else []
        return {trial.trial: trial.result["hostname"] for trial in trials if trial.status == "TERMINATED"}

    first = slurm.submit(config, folder, "--parsable")
    assert first.returncode == 0, first.stderr
    slurm.log.touch()
    until(lambda: len(ended()) >= 3, "three trainings end", slurm.log)
    assert slurm.call("scancel", first.stdout.strip()).returncode == 0  # as when its time is over
    before = ended()
    assert len(before) < 8
    until(lambda: not slurm.call("squeue", "--noheader").stdout.strip(), "the job ends", slurm.log)
    again = slurm.submit(config, folder, "--wait")
    assert again.returncode == 0, again.stderr + slurm.log.read_text()[-5000:]
    after = ended()
    assert len(after) == 8
    assert before.items() <= after.items()
    assert set(after.values()) == {"host2", "host3"}
    assert json.loads((folder / "summary.json").read_text())["trainings"] == 8
    token = slurm.network.folder / "home" / ".ray" / "auth_token"
    assert token.stat().st_mode & 0o077 == 0
