"""Clusters of several nodes on this machine."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator

import pytest

from tests.integration.conftest import SOCKET_PATHS, local_ray  # settings for the workers, before Ray is imported

__all__ = ["local_ray"]

import ray
from ray.cluster_utils import Cluster


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head that runs nothing but the driver; nodes are added by the test. A silent node is lost after seconds."""
    for name, value in (("period_ms", "1000"), ("timeout_ms", "1500"), ("failure_threshold", "3")):
        monkeypatch.setenv(f"RAY_health_check_{name}", value)
    folder = tempfile.mkdtemp(prefix="rb", dir=SOCKET_PATHS if SOCKET_PATHS.is_dir() else None)
    # Not the argument temp_dir, beside which Ray (2.60) writes the cluster's address into a default folder that a new
    # machine lacks.
    monkeypatch.setenv("RAY_TMPDIR", folder)
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    yield nodes
    ray.shutdown()
    nodes.shutdown()
    shutil.rmtree(folder, ignore_errors=True)
