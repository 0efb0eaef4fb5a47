"""A local or shared folder as the storage of an experiment, whose files are whole at every moment.

Tune copies the state of an experiment to its storage again and again. On a local disk a driver that dies in such a copy
leaves an empty file, and Tune then begins the experiment anew. Object stores have no such moment: there a file appears
when it is complete.
"""

from __future__ import annotations

import io
import os
from contextlib import suppress
from typing import Any

import pyarrow.fs
from fsspec.implementations.local import LocalFileSystem


class WholeFile(io.FileIO):
    """A file that appears under its name in one step when it is closed; never, if writing fails or nobody closes it."""

    def __init__(self, path: str) -> None:
        folder, name = os.path.split(path)
        self._path = path
        self._part = os.path.join(folder, f".{name}.{os.getpid()}.{id(self)}.part")
        self._broken = False
        super().__init__(self._part, "wb")

    def write(self, data: Any) -> int:
        try:
            rest = memoryview(data).cast("B")
            size = len(rest)
            while rest:  # the system may take less than all at once
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
                os.fsync(self.fileno())
                os.replace(self._part, self._path)
        finally:
            super().close()
            with suppress(FileNotFoundError):
                os.unlink(self._part)

    def __del__(self) -> None:
        self._broken = True
        self.close()


class WholeFiles(LocalFileSystem):  # type: ignore[misc]
    """fsspec's local files, written by way of `WholeFile`."""

    protocol = ("raybilevel-local",)  # of its own, so that fsspec's cache of instances does not mix the two up

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
