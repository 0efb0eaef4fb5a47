"""One local Ray per test module: few workers, a GPU in its books only, its own folder, shut down at the end."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before Ray is imported: workers inherit these.
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"

import ray

SOCKET_PATHS = Path("/tmp")  # a socket's path may have at most 107 bytes


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    folder = tempfile.mkdtemp(prefix="rb", dir=SOCKET_PATHS if SOCKET_PATHS.is_dir() else None)
    for attempt in range(3):
        try:
            ray.init(
                address="local", num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False, _temp_dir=folder,
                runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2])])}},
            )  # fmt: skip
            break
        except Exception:
            # On a loaded machine a raylet can abort at its start.
            ray.shutdown()
            if attempt == 2:
                raise
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)
