"""A local or shared folder as the storage of an experiment, in which every file is complete at every moment.

Tune copies the state of an experiment to its storage again and again. If the driver dies during such a copy to a local
disk, an empty file remains, and Tune then starts the experiment from scratch. Object stores do not have this problem:
a file appears there when it is complete.
"""

from __future__ import annotations

import io
import os
from contextlib import suppress
from typing import Any

import pyarrow.fs
from fsspec.implementations.local import LocalFileSystem


class WholeFile(io.FileIO):
    """A file that appears under its name in one step when it is closed.

    It never appears if writing fails or if nobody closes it.
    """

    def __init__(self, path: str) -> None:
        folder, name = os.path.split(path)
        self._path = path
        # In the same folder, as a rename is atomic only within a filesystem. Two writers get two names.
        self._part = os.path.join(folder, f".{name}.{os.getpid()}.{id(self)}.part")
        self._broken = False
        super().__init__(self._part, "wb")

    def write(self, data: Any) -> int:
        try:
            rest = memoryview(data).cast("B")
            size = len(rest)
            while rest:  # one call may write only a part
                rest = rest[super().write(rest) or 0 :]
            return size
        except BaseException:
            self._broken = True
            raise

    def close(self) -> None:
        if self.closed:
            return
        try:
            if not self._broken:
                os.fsync(self.fileno())  # else a power loss after the rename may leave an empty file
                os.replace(self._part, self._path)
        finally:
            super().close()
            with suppress(FileNotFoundError):
                os.unlink(self._part)

    def __del__(self) -> None:
        # Nobody closed the file, so its content may be incomplete. The inherited destructor would call `close` and so
        # publish it.
        self._broken = True
        self.close()


class WholeFiles(LocalFileSystem):  # type: ignore[misc]
    """fsspec's local filesystem, which writes through `WholeFile`."""

    protocol = ("raybilevel-local",)  # its own name, as fsspec caches instances by protocol

    def _open(self, path: str, mode: str = "rb", block_size: int | None = None, **options: Any) -> Any:
        if mode != "wb":
            return super()._open(path, mode=mode, block_size=block_size, **options)
        path = self._strip_protocol(path)
        if self.auto_mkdir:
            os.makedirs(os.path.dirname(path), exist_ok=True)
        return WholeFile(path)


def local_filesystem() -> pyarrow.fs.FileSystem:
    """For `RunConfig(storage_filesystem=)` with a `storage_path` on a local disk or in a shared folder."""
    return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(WholeFiles(auto_mkdir=True)))
