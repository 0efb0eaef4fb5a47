"""Trials, checkpoints and state in an object store: local servers of S3 and of Google Cloud Storage."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow.fs
import pytest

from raybilevel._cluster.storage import locate
from raybilevel.errors import StorageError
from raybilevel.search._state_file import read
from tests.cluster.object_stores import CREDENTIALS, FOLDER, MISSING, google, s3

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(FOLDER is None, reason=MISSING),
]

ROOT = Path(__file__).parents[2]


@pytest.fixture
def s3_bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    with s3(tmp_path / "server.log") as uri:
        yield uri


@pytest.fixture
def google_bucket(tmp_path: Path) -> Iterator[str]:
    with google(tmp_path / "server.log") as uri:
        yield uri


@pytest.mark.parametrize("store", ["s3_bucket", "google_bucket"])
def test_a_run_keeps_everything_in_the_bucket_and_resumes_from_it(
    store: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    bucket: str = request.getfixturevalue(store)

    def raybilevel(out: str, *more: str) -> subprocess.CompletedProcess[str]:
        arguments = ["run", "configs/digits.yaml", "--out", str(tmp_path / out), "--storage", bucket, *more]
        small = ["--set", "search.trainings=6", "--set", "options={train: 100, epochs: 4}"]
        return subprocess.run(
            [sys.executable, "-m", "raybilevel", *arguments, *small],
            capture_output=True, text=True, env={**os.environ, "RAY_AUTH_MODE": "disabled"}, cwd=ROOT, check=False,
        )  # fmt: skip

    done = raybilevel("a")
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert summary["trainings"] == 6
    assert summary["upper_steps"] >= 1  # a step read its checkpoint from the bucket
    storage = locate(bucket)
    checkpoint = summary["best"]["checkpoint"]
    assert storage.filesystem.get_file_info(f"{checkpoint}/lower_level.pt").is_file
    names = [f.base_name for f in storage.filesystem.get_file_info(pyarrow.fs.FileSelector(f"{storage.path}/tune"))]
    state = max(name for name in names if name.startswith("searcher-state"))
    local = tmp_path / "state"
    with storage.filesystem.open_input_file(f"{storage.path}/tune/{state}") as file:
        local.write_bytes(file.read())
    assert len(read(local).state.done) == 6
    again = raybilevel("b")
    assert again.returncode == 2
    assert "already holds a run" in again.stderr
    resumed = raybilevel("a", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads((tmp_path / "a" / "summary.json").read_text())["trainings"] == 6


def test_a_uri_that_is_wrong_is_named(s3_bucket: str) -> None:
    with pytest.raises(StorageError, match="connect_tmeout"):
        locate(s3_bucket + "&connect_tmeout=1")
