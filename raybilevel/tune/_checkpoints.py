"""Where the weights of trainings lie, also after the experiment's folder was moved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.fs

from raybilevel._cluster.storage import Storage
from raybilevel._metrics import TRIAL_PATH
from raybilevel.tune._trainable import checkpoint_path


class Checkpoints:
    """Paths of checkpoints on the experiment's filesystem, by index of the training.

    A restored experiment may lie in another folder by now. Tune moves its own paths along, and the next report of a
    training says where the folder is. Until then the paths here lead nowhere: `moved` is true.

    filesystem: the experiment's; None for a local or shared folder.
    """

    def __init__(self, filesystem: pyarrow.fs.FileSystem | None) -> None:
        self._filesystem = filesystem
        self.paths: dict[int, str] = {}
        self._folder = ""
        self.moved = False

    def add(self, index: int, result: Mapping[str, Any]) -> None:
        """The checkpoint of a training's last result, if it has one."""
        path = checkpoint_path(result)
        if path is not None:
            self.paths[index] = path

    def look(self) -> None:
        """See, after a restore, whether the folder is still where the paths say."""
        # A path is experiment/trial/checkpoint.
        self._folder = next((path.rsplit("/", 2)[0] for path in self.paths.values()), "")
        self.moved = bool(self._folder) and not self.is_there(self._folder)

    def follow(self, result: Mapping[str, Any]) -> None:
        """Read from a report where the folder is, and move the paths along if they lead nowhere. Those of an earlier
        experiment, which is where it was, stay."""
        folder, _, trial = str(result.get(TRIAL_PATH, "")).rpartition("/")
        if not trial or not self.moved:
            return
        before, self._folder, self.moved = self._folder, folder, False
        self.paths = {
            index: folder + path.removeprefix(before) if path.startswith(f"{before}/") else path
            for index, path in self.paths.items()
        }

    def is_there(self, folder: str) -> bool:
        parent, _, name = folder.rpartition("/")
        try:
            return Storage(self._filesystem or pyarrow.fs.LocalFileSystem(), parent).exists(name)
        except pa.ArrowInvalid:
            return False  # a path of another kind of storage
        except (pa.ArrowException, OSError):
            return True  # steps will say what is wrong with it
