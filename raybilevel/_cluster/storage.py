"""Where an experiment is stored, and whether every node of the cluster sees it."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.fs
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raybilevel._cluster.local_files import local_filesystem
from raybilevel._cluster.resources import nodes_alive
from raybilevel.errors import StorageError

NODE_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Storage:
    """A folder of a filesystem. `path` has no scheme."""

    filesystem: pyarrow.fs.FileSystem
    path: str

    def exists(self, name: str) -> bool:
        found: bool = self.filesystem.get_file_info(f"{self.path}/{name}").type != pyarrow.fs.FileType.NotFound
        return found

    def read(self, name: str) -> str:
        with self.filesystem.open_input_stream(f"{self.path}/{name}") as file:
            text: str = file.read().decode()
        return text

    def write(self, name: str, text: str) -> None:
        """Write a file completely or not at all."""
        self.filesystem.create_dir(self.path, recursive=True)
        with self.filesystem.open_output_stream(f"{self.path}/{name}") as file:
            file.write(text.encode())


def locate(uri: str | Path) -> Storage:
    """The storage at a folder ("/shared/runs/a", "file:///shared/runs/a") or a URI ("s3://bucket/a", "gs://bucket/a").

    Raises:
        StorageError: no such kind of storage, or it cannot be set up.
    """
    text = str(uri)
    if "://" not in text:
        return Storage(local_filesystem(), str(Path(text).absolute()))
    try:
        filesystem, path = pyarrow.fs.FileSystem.from_uri(text)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise StorageError(f"--storage {text}: {error}") from error
    path = path.rstrip("/")
    return Storage(local_filesystem() if text.startswith("file://") else filesystem, path)


def check_access(storage: Storage) -> None:
    """Check, before anything is trained, that every node can read what this process writes, and can write as well.

    Raises:
        StorageError: the storage cannot be written, or some nodes, which are named, cannot read or write it.
    """
    # Random content: another storage, mounted at the same path, cannot have it.
    marker, content = f"{storage.path}/.raybilevel-{uuid.uuid4().hex}", uuid.uuid4().bytes
    try:
        storage.filesystem.create_dir(storage.path, recursive=True)
        with storage.filesystem.open_output_stream(marker) as file:
            file.write(content)
    except (pa.ArrowException, OSError) as error:
        raise StorageError(f"cannot write to the storage {storage.path}: {error}") from error
    try:
        failures = nodes_without_access(storage, marker, content)
    finally:
        storage.filesystem.delete_file(marker)
    if failures:
        raise StorageError(
            f"the storage {storage.path} cannot be used on {len(failures)} of the cluster's nodes: "
            + "; ".join(f"{node}: {reason}" for node, reason in sorted(failures.items()))
            + ". Use a folder that all nodes mount at the same place, or a URI that all of them reach (s3://..., gs://...)"
        )


def nodes_without_access(storage: Storage, marker: str, content: bytes) -> dict[str, str]:
    """The reasons why other nodes cannot use the storage, by their addresses. This node is left out."""
    # It has just written the marker.
    here = ray.get_runtime_context().get_node_id()
    asked = {
        probe_access.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
            storage.filesystem, marker, content
        ): node["NodeManagerAddress"]
        for node in nodes_alive()
        if node["NodeID"] != here
    }
    if not asked:
        return {}
    done, silent = ray.wait(list(asked), num_returns=len(asked), timeout=NODE_TIMEOUT_S)
    found = {asked[task]: f"no answer within {NODE_TIMEOUT_S:.0f} s" for task in silent}
    for task in done:
        try:
            reason = ray.get(task)
        except ray.exceptions.RayError as error:
            reason = str(error).splitlines()[-1]
        if reason is not None:
            found[asked[task]] = reason
    for task in silent:
        ray.cancel(task, force=True)
    return found


@ray.remote(num_cpus=0, max_retries=1)  # type: ignore[untyped-decorator]
def probe_access(filesystem: pyarrow.fs.FileSystem, marker: str, content: bytes) -> str | None:
    """Why this node does not see the marker, or cannot write beside it; None if it can."""
    try:
        with filesystem.open_input_stream(marker) as file:
            if file.read() != content:
                return "holds other files at this path"
    except (pa.ArrowException, OSError) as error:
        return f"cannot be read: {error}"
    own = f"{marker}-{uuid.uuid4().hex}"
    try:
        with filesystem.open_output_stream(own) as file:
            file.write(content)
        filesystem.delete_file(own)
    except (pa.ArrowException, OSError) as error:
        return f"cannot be written: {error}"
    return None
