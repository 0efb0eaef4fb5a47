"""Tune's own snapshot of an experiment, read as data: which trials there are and what they last reported.

Tune writes three files one after the other, its trials, the searcher's state and the counter of its search generator,
and copies them to the storage one after the other. A driver that dies in between leaves files of different moments;
a disk may damage one. What the snapshot says of the trials decides what a restored search has still to hear.
"""

from __future__ import annotations

import json
import logging
import pickletools
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.fs
from ray.tune.search import Searcher, SearchGenerator

from raybilevel.errors import StateError

logger = logging.getLogger(__name__)

EXPERIMENT_STATE = "experiment_state-"
GENERATOR_STATE = "search_gen_state-"
PREVIOUS = "previous-"
DAMAGED = ".damaged"
CLOCK_TICK = 0.1


@dataclass(frozen=True)
class TrialRecord:
    """A trial in Tune's snapshot.

    status: PENDING, RUNNING, PAUSED, TERMINATED or ERROR.
    result: what it last reported, nested; empty before the first report.
    """

    trial: str
    status: str
    config: Mapping[str, Any]
    result: Mapping[str, Any]


def parse(text: str) -> list[TrialRecord]:
    """The trials of a snapshot, in the order in which they began. Objects pickled in it stay unread.

    Raises:
        StateError: it is truncated or not a snapshot.
    """
    try:
        # Tune writes each trial as a JSON text within the JSON.
        pairs = [(json.loads(trial), json.loads(metadata)) for trial, metadata in json.loads(text)["trial_data"]]
        return [
            TrialRecord(trial["trial_id"], trial["status"], trial["config"], metadata.get("last_result") or {})
            for trial, metadata in pairs
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StateError(f"not a snapshot of trials ({type(error).__name__}: {error})") from error


def synced(paths: Iterable[Path], since: float) -> list[Path]:
    """Of files in the folder into which Tune copies the storage before it resumes, those that it has copied there.

    Others, with newer names, may be left from an earlier driver in the same Ray session that was killed before they
    reached the storage; the trials that Tune resumes are not in them.

    since: when the resuming searcher was made, in seconds since 1970. Where no file is so new, all of them.
    """
    found = list(paths)
    return [path for path in found if path.stat().st_mtime >= since - CLOCK_TICK] or found


def read_trials(folder: str | Path, since: float = 0.0) -> list[TrialRecord] | None:
    """The trials of the newest snapshot in a local folder; None where there is none that can be read.

    since: see `synced`.
    """
    snapshots = sorted(synced(Path(folder).glob(f"{EXPERIMENT_STATE}*.json"), since))
    if not snapshots:
        return None
    try:
        return parse(snapshots[-1].read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, StateError) as error:
        logger.error("%s: %s", snapshots[-1], error)
        return None


def prepare_resume(filesystem: pyarrow.fs.FileSystem, folder: str) -> list[str]:
    """Make sure that Tune resumes the experiment in this folder of the storage from files that it can read.

    Of files that it cannot read, Tune says so in the log and begins the whole experiment anew. Here they are renamed,
    so that it takes the newest ones that are whole; what they held beyond those is trained again.

    Returns:
        The files that were set aside.

    Raises:
        StateError: trainings have ended, and no whole snapshot or no whole state of the search generator is left.
    """
    files = filesystem.get_file_info(pyarrow.fs.FileSelector(folder, allow_not_found=True))
    paths = {f.base_name: f.path for f in files if f.is_file and f.base_name.endswith(".json")}
    aside = []

    def newest_whole(prefix: str, check: Callable[[bytes], object]) -> object:
        current = {name.removeprefix(PREVIOUS) for name in paths}  # of a new one its copy alone may be there
        for name in sorted((name for name in current if name.startswith(prefix)), reverse=True):
            for candidate in (name, PREVIOUS + name):
                if candidate not in paths:
                    continue
                try:
                    with filesystem.open_input_stream(paths[candidate]) as file:
                        content = check(file.read())
                except (StateError, UnicodeDecodeError) as error:
                    logger.error("%s: %s; the one before it is used", paths[candidate], error)
                    aside.append(paths.pop(candidate))
                    filesystem.move(aside[-1], aside[-1] + DAMAGED)
                    continue
                # Tune finds a file by its own name alone.
                if candidate != name:
                    paths[name] = paths[candidate].removesuffix(candidate) + name
                    filesystem.move(paths.pop(candidate), paths[name])
                return content
        return None

    # Tune needs both to resume: the trials, and the state of its search generator.
    trials = newest_whole(EXPERIMENT_STATE, lambda content: parse(content.decode()))
    generator = newest_whole(GENERATOR_STATE, check_pickle)
    if trials is None and aside:
        raise StateError(
            f"{folder}: no snapshot of the experiment can be read ({', '.join(aside)}: truncated or changed), so it "
            "cannot be resumed. The trials' folders with their checkpoints are whole; begin anew in another folder"
        )
    if isinstance(trials, list) and generator is None:
        if any(record.result or record.status in ("TERMINATED", "ERROR") for record in trials):
            raise StateError(f"{folder}: no state of Tune's search generator can be read, so it cannot be resumed")
        for name in [name for name in paths if name.startswith(EXPERIMENT_STATE)]:  # nothing was observed yet
            filesystem.move(paths[name], paths[name] + DAMAGED)
    return aside


def check_pickle(content: bytes) -> bool:
    """Whether a pickle is whole, without running it.

    Raises:
        StateError: it is truncated or no pickle.
    """
    try:
        for _ in pickletools.genops(content):
            pass
    except Exception as error:  # ValueError and whatever a damaged operand raises
        raise StateError(f"not a pickle ({error})") from error
    return True


class ResumableGenerator(SearchGenerator):  # type: ignore[misc]
    """Tune's search generator, whose counter of trials agrees with the trials that a resumed experiment has.

    Files of different moments would make Tune end with more or fewer than `num_samples` trials. And its state, which
    Tune pickles without a checksum, is kept twice. Give it to Tune in the place of the searcher that it wraps.

    samples: trials in all, also of a resumed experiment. Tune otherwise goes by the `num_samples` with which the
        experiment began, whatever it is given when it resumes.
    """

    def __init__(self, searcher: Searcher, samples: int | None = None) -> None:
        super().__init__(searcher)
        self._made = time.time()
        self._samples_asked = samples

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._made = time.time()

    def save_to_dir(self, dirpath: str, session_str: str) -> None:
        keep_previous(Path(dirpath, self.CKPT_FILE_TMPL.format(session_str)))
        super().save_to_dir(dirpath, session_str)

    def restore_from_dir(self, dirpath: str) -> None:
        super().restore_from_dir(dirpath)
        trials = read_trials(dirpath, self._made)
        if trials is not None:
            self._counter = len(trials)
        if self._samples_asked is not None:
            self._total_samples = self._samples_asked


def keep_previous(path: Path) -> None:
    """Keep a copy of a file that is about to be replaced; both are there, and the copy is whole, at every moment."""
    if path.exists():
        part = path.with_name(f".{PREVIOUS}{path.name}.part")
        shutil.copyfile(path, part)
        part.replace(path.with_name(PREVIOUS + path.name))
