"""A Ray cluster of separate hosts, with token authentication, on which jobs keep everything in an S3 server.

`make test-cluster` names in RAYBILEVEL_TEST_HOSTS a Python with `ray[default]`, the hosts' image. Then these tests fail
where hosts cannot be made; without it they are skipped.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pyarrow.fs
import pytest

from raybilevel.search import _state_file as state_file
from raybilevel.tune._snapshot import EXPERIMENT_STATE, TrialRecord, parse
from tests.cluster.hosts import Host, Network, cannot, until
from tests.cluster.object_stores import CREDENTIALS, FOLDER, MISSING, s3_server
from tests.integration.conftest import SOCKET_PATHS

IMAGE = os.environ.get("RAYBILEVEL_TEST_HOSTS")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        IMAGE is None, reason="RAYBILEVEL_TEST_HOSTS does not name a Python with ray[default]; make test-cluster does"
    ),
    pytest.mark.skipif(FOLDER is None, reason=MISSING),
]

ROOT = Path(__file__).parents[2]
RAY = [str(IMAGE), "-m", "ray.scripts.scripts"]
SUBMIT = ROOT / "configs" / "cluster" / "submit.sh"
QUICK_TO_NOTICE = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1500",
    "RAY_health_check_failure_threshold": "3",
}


class HostCluster:
    """A head that runs nothing but drivers, workers of one CPU each, and a bucket that all of them reach."""

    def __init__(self, network: Network, port: int, folder: Path) -> None:
        assert IMAGE is not None
        token = folder / "token"
        token.write_text(secrets.token_hex(32))
        token.chmod(0o600)
        self.network, self.folder = network, folder
        self.environment = {
            **CREDENTIALS,
            **QUICK_TO_NOTICE,
            "AWS_ENDPOINT_URL": f"http://{network.address(254)}:{port}",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "OMP_NUM_THREADS": "1",
            "PATH": os.pathsep.join([str(Path(IMAGE).parent), str(Path(sys.executable).parent), os.defpath]),
            "PYTHONPATH": str(ROOT),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        self.filesystem = pyarrow.fs.S3FileSystem(
            access_key="testing", secret_key="testing", region="us-east-1", scheme="http",
            endpoint_override=f"{network.address(254)}:{port}", allow_bucket_creation=True,
        )  # fmt: skip
        self.filesystem.create_dir("bucket")
        self.head = self.start(
            "--head", "--port=6379", f"--temp-dir={network.disk}/ray", f"--dashboard-host={network.address(1)}",
            "--num-cpus=0",
        )  # fmt: skip

    def start(self, *options: str) -> Host:
        address = self.network.address(len(self.network.hosts) + 1)
        words = [*RAY, "start", "--block", f"--node-ip-address={address}", "--object-store-memory=100000000", *options]
        return self.network.add(words, self.environment)

    def add_worker(self) -> Host:
        return self.start(f"--address={self.head.address}:6379", "--num-cpus=1")

    def workers(self, count: int) -> list[Host]:
        """The first workers, those added that are not there."""
        while len(self.network.hosts) <= count:
            self.add_worker()
        return self.network.hosts[1 : count + 1]

    def ray(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """A `ray` command on this machine, which is none of the cluster's."""
        return subprocess.run(
            [*RAY, *words], capture_output=True, text=True, check=False, cwd=ROOT,
            env={**self.environment, "RAY_API_SERVER_ADDRESS": f"http://{self.head.address}:8265", **environment},
        )  # fmt: skip

    def submit(
        self, name: str, *more: str, wait: bool = True, job: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """The line of configs/cluster/submit.sh, of a small experiment; job: its name, if not the experiment's."""
        line = SUBMIT.read_text().splitlines()[-1].replace("my-bucket/runs/one", f"bucket/{name}")
        words = [word for word in shlex.split(line) if word != "RAY_AUTH_MODE=token"][1:]
        options = ["--submission-id", job or name, *([] if wait else ["--no-wait"])]
        return self.ray(*words[:2], *options, *words[2:], *more)

    def status(self, name: str) -> str:
        found = re.search(r"(PENDING|RUNNING|SUCCEEDED|FAILED|STOPPED)", self.ray("job", "status", name).stdout.upper())
        return found[0] if found else "unknown"

    def trials(self, name: str) -> list[TrialRecord]:
        """Tune's newest snapshot in the bucket."""
        found = self.newest(name, EXPERIMENT_STATE)
        return parse(found.decode()) if found is not None else []

    def file(self, path: str) -> bytes | None:
        if not self.filesystem.get_file_info(f"bucket/{path}").is_file:
            return None
        content: bytes = self.filesystem.open_input_stream(f"bucket/{path}").read()
        return content

    def dead(self) -> dict[str, float]:
        """When the head noticed the loss of a host, in seconds since 1970, by the host's address."""
        listed = self.ray("list", "nodes", "--format", "json", "--detail", "--filter", "state=DEAD")
        assert listed.returncode == 0, listed.stderr
        nodes = json.loads(listed.stdout)
        return {node["node_ip"]: datetime.fromisoformat(node["end_time_ms"]).timestamp() for node in nodes}

    def newest(self, name: str, prefix: str) -> bytes | None:
        files = self.filesystem.get_file_info(pyarrow.fs.FileSelector(f"bucket/{name}/tune", allow_not_found=True))
        names = sorted(file.path for file in files if file.base_name.startswith(prefix))
        return self.filesystem.open_input_stream(names[-1]).read() if names else None


@pytest.fixture(scope="module")
def hosts() -> Iterator[HostCluster]:
    if (reason := cannot()) is not None:
        pytest.fail(reason)
    folder = Path(tempfile.mkdtemp(prefix="rb", dir=SOCKET_PATHS))
    try:
        with Network(folder) as network, s3_server(network.address(254), folder / "s3.log") as port:
            cluster = HostCluster(network, port, folder)
            until(lambda: cluster.ray("job", "list").returncode == 0, "the head answers", cluster.head.log)
            yield cluster
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def small(trainings: int, epochs: int = 4) -> list[str]:
    return ["--set", f"search.trainings={trainings}", "--set", f"options.epochs={epochs}", "--set", "options.train=100"]


def test_nobody_without_the_token_is_served(hosts: HostCluster) -> None:
    wrong = hosts.folder / "wrong"
    wrong.write_text(secrets.token_hex(32))
    refused = hosts.ray("job", "list", RAY_AUTH_TOKEN_PATH=str(wrong))
    assert refused.returncode != 0
    assert re.search(r"(?i)401|403|token|auth", refused.stdout + refused.stderr)


def test_a_job_trains_on_every_host_and_keeps_everything_in_the_bucket(hosts: HostCluster) -> None:
    workers = hosts.workers(2)
    done = hosts.submit("one", *small(8), "--set", "search.max_concurrent=2")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    trials = hosts.trials("one")
    assert len(trials) == 8
    assert {trial.status for trial in trials} == {"TERMINATED"}
    assert {trial.result["node_ip"] for trial in trials} == {worker.address for worker in workers}
    assert {trial.result["hostname"] for trial in trials} == {worker.name for worker in workers}
    saved = hosts.newest("one", "searcher-state")
    assert saved is not None
    (hosts.folder / "state").write_bytes(saved)
    state = state_file.read(hosts.folder / "state").state
    assert len(state.done) == 8
    assert any(not step.failed for step in state.steps)  # a step read a checkpoint that another host had written


CLIENT = """
import sys
import ray
from ray import tune
from raybilevel import BilevelSearch, lower_level_trainable
from raybilevel.problems import make_problem
from raybilevel._cluster.storage import locate

ray.init(sys.argv[1])
problem = make_problem("digits", {"train": 100, "epochs": 4})
place = locate("s3://bucket/client")
results = tune.Tuner(
    tune.with_resources(lower_level_trainable(problem), {"cpu": 1}),
    param_space={"weight_decay": {name: tune.loguniform(1e-3, 1e2) for name in ("fc1", "fc2", "fc3")}},
    tune_config=tune.TuneConfig(
        search_alg=BilevelSearch(problem, max_concurrent=2, storage_filesystem=place.filesystem),
        metric="upper_loss", mode="min", num_samples=5, reuse_actors=True,
    ),
    run_config=tune.RunConfig(name="tune", storage_path=place.path, storage_filesystem=place.filesystem),
).fit()
print("trained", len(results), "failed", len(results.errors))
"""


def test_a_tuner_runs_over_ray_client(hosts: HostCluster) -> None:
    assert IMAGE is not None
    hosts.workers(2)
    done = subprocess.run(
        [IMAGE, "-c", CLIENT, f"ray://{hosts.head.address}:10001"],
        capture_output=True, text=True, check=False, env=hosts.environment, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "trained 5 failed 0" in done.stdout
    saved = hosts.newest("client", "searcher-state")
    assert saved is not None
    (hosts.folder / "state").write_bytes(saved)
    assert len(state_file.read(hosts.folder / "state").state.done) == 5


PARALLEL = """
import ray
from ray import tune
from ray.train import ScalingConfig
from raybilevel import BilevelSearch
from raybilevel.tune._data_parallel import data_parallel_trainable
from raybilevel._lower.training import train
from raybilevel._cluster.storage import locate
from tests.cluster.test_data_parallel import Regression

ray.init("auto")
problem, place = Regression(), locate("s3://bucket/parallel")
results = tune.Tuner(
    data_parallel_trainable(problem, ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1})),
    param_space={"x": {"a": tune.loguniform(1e-4, 1e2)}},
    tune_config=tune.TuneConfig(
        search_alg=BilevelSearch(problem, max_concurrent=1, storage_filesystem=place.filesystem),
        metric="upper_loss", mode="min", num_samples=3,
    ),
    run_config=tune.RunConfig(name="tune", storage_path=place.path, storage_filesystem=place.filesystem),
).fit()
differences = [
    abs(train(problem, {"x": one.config["x"]})[0].upper_loss / one.metrics["upper_loss"] - 1) for one in results
]
print("trained", len(results), "failed", len(results.errors), "as on one host", max(differences) < 1e-9)
"""


def test_a_training_runs_on_two_hosts_together(hosts: HostCluster) -> None:
    """Each has one CPU, which a worker of the training takes."""
    hosts.workers(2)
    done = hosts.ray("job", "submit", "--", "python", "-c", PARALLEL)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "trained 3 failed 0 as on one host True" in done.stdout


def test_a_folder_that_hosts_do_not_share_is_refused(hosts: HostCluster) -> None:
    workers = hosts.workers(2)
    refused = hosts.submit("private", "--storage", f"{hosts.network.disk}/runs", *small(8))
    assert refused.returncode != 0
    output = refused.stdout + refused.stderr
    assert "cannot be used on 2 of the cluster's nodes" in output
    for worker in workers:
        assert f"{worker.address}: cannot be read" in output


def test_a_job_that_was_lost_goes_on_from_what_the_bucket_holds(hosts: HostCluster) -> None:
    """In another working directory, as Ray gives each job its own: nothing of the first one's is there."""
    hosts.workers(2)
    options = [*small(8, epochs=100), "--set", "search.max_concurrent=2"]
    submitted = hosts.submit("resumed", *options, wait=False)
    assert submitted.returncode == 0, submitted.stderr

    def observed() -> dict[str, str]:
        """What has ended, by the trial: its config."""
        over = (trial for trial in hosts.trials("resumed") if trial.status == "TERMINATED")
        return {trial.trial: json.dumps(trial.config, sort_keys=True) for trial in over}

    until(lambda: len(observed()) >= 3, "three trainings end", hosts.head.log)
    assert hosts.ray("job", "stop", "resumed").returncode == 0
    before = observed()
    assert len(before) < 8
    assert hosts.file("resumed/summary.json") is None
    done = hosts.submit("resumed", *options, "--resume", job="resumed-again")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    after = observed()
    assert len(after) == len(set(after.values())) == 8
    assert before.items() <= after.items()
    summary = hosts.file("resumed/summary.json")
    assert summary is not None
    assert json.loads(summary)["trainings"] == 8


def test_hosts_lost_in_the_middle_cost_nothing_and_one_that_joins_is_used(hosts: HostCluster) -> None:
    """One host dies, another is cut off the network; a third one comes. All in one experiment of 14 trainings."""
    dead, cut = hosts.workers(2)
    options = ["--set", "search.max_concurrent=2", "--set", "search.max_failures=-1"]
    submitted = hosts.submit("faults", *small(14, epochs=400), *options, wait=False)
    assert submitted.returncode == 0, submitted.stderr

    def ended(count: int) -> bool:
        return sum(trial.status == "TERMINATED" for trial in hosts.trials("faults")) >= count

    until(lambda: ended(3), "three trainings end", hosts.head.log)
    dead.lose()
    new = hosts.add_worker()
    until(lambda: ended(6), "six trainings end", hosts.head.log)
    assert not ended(14), "the trainings are too short to be hit in the middle"
    cut.cut()
    begun = time.time()
    until(lambda: cut.address in hosts.dead(), "the loss is noticed", hosts.head.log, seconds=60)
    seconds = hosts.dead()[cut.address] - begun
    print(f"the host that was cut off counted as lost after {seconds:.1f} s")
    assert 0 < seconds < 15  # Ray's defaults take half a minute
    until(lambda: hosts.status("faults") not in ("PENDING", "RUNNING"), "the job ends", hosts.head.log, seconds=900)
    assert hosts.status("faults") == "SUCCEEDED", hosts.ray("job", "logs", "faults").stdout[-3000:]
    trials = hosts.trials("faults")
    assert len(trials) == 14
    assert {trial.status for trial in trials} == {"TERMINATED"}
    assert len({json.dumps(trial.config, sort_keys=True) for trial in trials}) == 14
    assert trials[-1].result["node_ip"] == new.address
