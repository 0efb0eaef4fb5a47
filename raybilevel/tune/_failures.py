"""Trainings that failed, or were stopped, all of them: why, and when a search ends for it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

from raybilevel.errors import NotFiniteError, RaybilevelError

ALIKE_AT_MOST = 3
"""Trainings that may fail with one cause before any has succeeded, and that may be stopped before a warning."""
NOT_OF_THE_PROBLEM = ("ray.exceptions.", NotFiniteError.__name__)
"""Causes that another point, or another node, may not have."""

WORKER_DIED = re.compile(r"worker process has died\. Worker exit type: (?!INTENDED_SYSTEM_EXIT)(\w+)")
"""In what Ray says of an actor whose process ended by itself. Of one that went with its node it says something else."""
NO_MEMORY = "running low on memory"
"""In what Ray says of a worker that it killed for its memory."""

NUMBER = re.compile(r"0x[0-9a-f]+|-?\d+(\.\d*)?(e[-+]?\d+)?")

ErrorFile = Callable[[str], str | None]
"""Where the error of a trial is kept; None where that is not known."""


class FailedTrainings:
    """Counts failures by their cause until a training succeeds: a problem that always fails needs no search."""

    def __init__(self) -> None:
        self._new: list[tuple[str, str | None]] = []
        self._causes: Counter[str] = Counter()

    def failed(self, trial: str, cause: str | None = None) -> None:
        """cause: where the search knows it; else the trial's error file has it."""
        self._new.append((trial, cause))

    def always(self, error_file: ErrorFile) -> RaybilevelError | None:
        """Why every training fails; None as long as that is not said. To be asked while none has succeeded."""
        trials, self._new = self._new, []
        for trial, known in trials:
            path = error_file(trial) if known is None else None
            cause = known if path is None else read_cause(path)
            if cause is None or any(name in cause for name in NOT_OF_THE_PROBLEM):
                continue
            # Causes that differ by a number alone, e.g. a size, an address or a hyperparameter, are the same.
            alike = NUMBER.sub("#", cause)
            self._causes[alike] += 1
            if self._causes[alike] >= ALIKE_AT_MOST:
                whole = "" if path is None else f" (all of it: {path})"
                return RaybilevelError(
                    f"the first {self._causes[alike]} trainings failed alike, and none succeeded: {cause}{whole}"
                )
        return None


def read_cause(path: str) -> str | None:
    """The line of a traceback that says what was raised; None where there is none, or the file cannot be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return cause_of(file.read())
    except OSError:
        return None


def cause_of(text: str) -> str | None:
    """The first line behind the last frame of a traceback; or how the process died, which leaves none."""
    if NO_MEMORY in text:
        return "Ray killed the worker, as its node had no memory left; let trainings ask for more memory"
    if died := WORKER_DIED.search(text):
        return f"the worker process died ({died[1]}), as by os._exit, a crash, or for want of memory; see its log"
    lines = text.splitlines()
    frames = [number for number, line in enumerate(lines) if line.startswith('  File "')]
    behind = lines[frames[-1] + 1 :] if frames else []
    return next((line.strip() for line in behind if line.strip() and not line.startswith(" ")), None)
