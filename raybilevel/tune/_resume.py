"""How a search goes on after a crash: from its newest whole state, and from what Tune's snapshot knows beyond that."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray.tune.search import Searcher

from raybilevel import _objectives
from raybilevel._metric_bounds import Bounds, as_written
from raybilevel._objectives import Others
from raybilevel._parameter import readable
from raybilevel.errors import RaybilevelError, StateError
from raybilevel.search import BilevelOptimizer
from raybilevel.search._state_file import SavedSearch
from raybilevel.search_state import SearchState
from raybilevel.space import Parameter, Space
from raybilevel.tune import _snapshot as snapshot

logger = logging.getLogger(__name__)


class ResumableSearcher(Searcher):  # type: ignore[misc]
    """A searcher whose state is kept twice, and agrees with Tune's snapshot of the trials after a restore.

    Tune calls `restore` and `restore_from_dir` on a fresh searcher, and would go on with a single trial if they raised.
    So a state that cannot be used is reported as an error in the log.
    """

    @property
    @abstractmethod
    def made(self) -> float:
        """When this object was made or unpickled, in seconds since 1970."""

    @abstractmethod
    def load(self, path: str | Path) -> None:
        """Go on from a state file.

        Raises:
            RaybilevelError: it cannot be used; nothing has changed then.
        """

    @abstractmethod
    def catch_up(self, records: Sequence[snapshot.TrialRecord]) -> int | None:
        """Hear from Tune's snapshot what the state missed: how many trials or results; None where there is no space."""

    @property
    @abstractmethod
    def state(self) -> SearchState:
        """Every training and upper-level step so far."""

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Tune's periodic save; the state before is kept as well, and a copy of Tune's own snapshot.

        Tune has just written that, and will write over it while a thread copies it to the storage.
        """
        snapshot.keep_previous(Path(checkpoint_dir, self.CKPT_FILE_TMPL.format(session_str)))
        snapshot.keep_previous(Path(checkpoint_dir, f"{snapshot.EXPERIMENT_STATE}{session_str}.json"))
        super().save_to_dir(checkpoint_dir, session_str)

    def restore(self, checkpoint_path: str) -> None:
        """Go on from a saved search; if it cannot be used, the search begins anew when Tune gives it the space."""
        if not self._loaded(checkpoint_path):
            logger.error("the search could not be restored and begins anew")

    def restore_from_dir(self, checkpoint_dir: str) -> None:
        """Go on from the newest state in a folder that can be read, and from what Tune's snapshot beside it knows.

        Trials of the snapshot that the state does not know, or of whose end it has not heard, are added to it: nothing
        that was observed is lost with a state file, at most the upper-level steps in it.
        """
        files = newest_first(checkpoint_dir, self.CKPT_FILE_TMPL.format("*"), self.made)
        used = next((path for path in files if self._loaded(path)), None)
        newest = used is not None and used == files[0]
        if used is None:
            logger.error("no state of the search can be read in %s; it begins anew", checkpoint_dir)
        elif not newest:
            logger.error("the search goes on from an older state, %s", used)
        records = snapshot.read_trials(checkpoint_dir, self.made)
        heard = self.catch_up(records) if records is not None else None
        if heard is not None and (heard or not newest):
            logger.warning(
                "%d trials or results were taken over from Tune's snapshot; the search knows %d trainings and %d "
                "upper-level steps", heard, len(self.state.trainings), len(self.state.steps),
            )  # fmt: skip

    def _loaded(self, path: str | Path) -> bool:
        try:
            self.load(path)
        except RaybilevelError as error:
            logger.error("%s cannot be used: %s", path, error)
            return False
        return True


def newest_first(folder: str, pattern: str, since: float) -> list[Path]:
    """The state files in the folder from which Tune resumes, each followed by the copy of the one before it.

    pattern: of their names.
    since:   see `snapshot.synced`.
    """
    there = snapshot.synced(Path(folder).glob(f"*{pattern}"), since)
    # Tune has the time in the names, and takes the last by name for the newest.
    current = sorted({path.name.removeprefix(snapshot.PREVIOUS) for path in there}, reverse=True)
    candidates = (Path(folder, name) for one in current for name in (one, snapshot.PREVIOUS + one))
    return [path for path in candidates if path in there]


def check_saved(
    saved: SavedSearch,
    space: Space | None,
    metric: str | None,
    mode: str | None,
    bounds: Bounds = (),
    others: Others = (),
) -> None:
    """Refuse the state of another search than one with this space, metric and mode, as far as they are known, and with
    these constraints and other objectives.

    Raises:
        StateError: naming what differs.
    """
    if space is not None and (now := as_saved(space.parameters)) != (before := as_saved(saved.parameters)):
        saved_words, words = told_apart(before, now)
        raise StateError(f"the state is of the space with {saved_words}; this search is of one with {words}")
    if metric not in (None, saved.metric) or mode not in (None, saved.mode):
        raise StateError(
            f"the state is of metric {saved.metric!r}, mode {saved.mode!r}; this search is of metric {metric!r}, mode "
            f"{mode!r}"
        )
    if bounds != saved.constraints:
        raise StateError(
            f"the state is of constraints {as_written(saved.constraints)}; this search has {as_written(bounds)}"
        )
    if others != saved.others:
        theirs, ours = _objectives.as_written(saved.others), _objectives.as_written(others)
        raise StateError(f"the state is of the objectives {theirs} beside its metric; this search has {ours}")


def as_saved(parameters: Sequence[Parameter]) -> tuple[Parameter, ...]:
    """Hyperparameters as a state file has them, without the objects among their choices."""
    return tuple(replace(p, choices=readable(p.choices)) for p in parameters)


def told_apart(one: Sequence[Parameter], other: Sequence[Parameter]) -> tuple[str, str]:
    """In words, what either of two spaces has and the other has not."""
    only = [p for p in one if p not in other], [p for p in other if p not in one]
    if not any(only):
        only = list(one), list(other)  # in another order
    words = [[in_words(p) for p in found] for found in only]
    if words[0] == words[1]:  # they differ in something else, such as conditions
        words = [list(map(str, found)) for found in only]
    return ", ".join(words[0]) or "nothing else", ", ".join(words[1]) or "nothing else"


def in_words(parameter: Parameter) -> str:
    prior = f" and prior {parameter.prior}" if parameter.prior else ""
    return f"{parameter.name}: {parameter.domain}({', '.join(map(repr, parameter.arguments))}){prior}"


def adopt_records(
    optimizer: BilevelOptimizer,
    records: Sequence[snapshot.TrialRecord],
    tell: Callable[[str, Mapping[str, Any] | None], None],
) -> int:
    """Tell a search what its state missed of the trials in a snapshot, in the order in which it happened.

    Trials that the snapshot does not know will never report, so their configurations are to be asked again.

    tell: hands a trial's last result to the search; None where it failed.

    Returns:
        How many trials or results the search did not know.
    """
    heard = 0
    for record in records:
        if record.trial not in optimizer.trials:
            heard += optimizer.adopt(record.trial, record.config)
    over = [r for r in records if r.status in ("TERMINATED", "ERROR") and r.trial in optimizer.trials]
    # In the order of their last reports, as `finished` counts them.
    for record in sorted(over, key=lambda record: record.result.get("timestamp", 0)):
        before = optimizer.state.trainings[optimizer.trials[record.trial]].status
        ended = record.status == "TERMINATED"
        # A result that the state knows already is not told twice.
        if before in ("pending", "lost") or (before == "failed" and ended):  # it was tried again
            tell(record.trial, record.result if ended else None)
            heard += 1
    known = {record.trial for record in records}
    optimizer.forget([trial for trial in optimizer.pending_trials if trial not in known])
    return heard
