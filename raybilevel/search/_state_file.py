"""A search on disk: named fields, a format version, a checksum; written whole or not at all."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

from raybilevel._metric_bounds import Bounds
from raybilevel._objectives import Others
from raybilevel.errors import StateError
from raybilevel.search_state import Proposal, SearchState
from raybilevel.space import Parameter, flatten

# JSON has no NaN, by which gradients say that an entry is not known.
FORMAT = 3
CHECKED = ConfigDict(extra="forbid", ser_json_inf_nan="strings")


@checked_dataclass(frozen=True, kw_only=True, config=CHECKED)
class SavedOptimizer:
    """Everything a `BilevelOptimizer` needs to go on. Steps under way are left out: they are planned again.

    method, settings: its name and, as JSON, its settings, to refuse a state that belongs to another one.
    parameters: of the space, likewise.
    trials:     trial id -> index of its training.
    queue:      proposals not asked yet.
    memory:     what the method's last step left for its next, in base64.
    """

    method: str
    settings: str
    seed: int
    slots: int
    parameters: tuple[Parameter, ...]
    state: SearchState
    trials: dict[str, int]
    queue: tuple[Proposal, ...]
    memory: str | None = None


@checked_dataclass(frozen=True, kw_only=True, config=CHECKED)
class SavedSearch(SavedOptimizer):
    """The same, of a search on Ray.

    constraints: bounds on metrics, to refuse a state that has others.
    others:      objectives beside the metric, likewise.
    constants:   around the space, as JSON.
    checkpoints: index of a training -> where its weights lie.
    space:       the whole space and the constants, pickled, where functions or objects belong to them.
    """

    metric: str
    mode: str
    constants: str
    checkpoints: dict[int, str]
    space: str | None = None
    constraints: Bounds = ()
    others: Others = ()


ADAPTER: TypeAdapter[SavedSearch] = TypeAdapter(SavedSearch)


def write(path: str | Path, saved: SavedSearch) -> None:
    """Write atomically: a crash leaves the old file or the new one, never half of one."""
    payload = ADAPTER.dump_json(saved).decode()
    # The search is text within the document, so that the checksum is over just what is read back.
    document = json.dumps({"format": FORMAT, "sha256": digest(payload), "search": payload})
    # In the same folder, as a rename is atomic only within a filesystem.
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(document)
        file.flush()
        # Else a power loss after the rename may leave an empty file.
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read(path: str | Path) -> SavedSearch:
    """Read a state file back.

    Raises:
        StateError: it is missing, damaged, of another format version, or does not hold a search.
    """
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StateError(f"{path}: not a readable search state ({error})") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        found = document.get("format") if isinstance(document, dict) else None
        raise StateError(f"{path}: state format {found!r}; this version reads format {FORMAT}")
    payload = document.get("search")
    if not isinstance(payload, str) or digest(payload) != document.get("sha256"):
        raise StateError(f"{path}: the checksum does not match; the file was truncated or changed")
    try:
        return ADAPTER.validate_json(payload)
    except ValidationError as error:
        raise StateError(f"{path}: not a search state: {error}") from error


def digest(payload: str) -> str:
    return hashlib.sha256(payload.encode()).hexdigest()


def encode(memory: bytes | None) -> str | None:
    return None if memory is None else base64.b64encode(memory).decode()


def decode(memory: str | None) -> bytes | None:
    return None if memory is None else base64.b64decode(memory)


def as_json(settings: Any) -> str:
    # What JSON has no form for is compared as text.
    return json.dumps(settings, sort_keys=True, default=str)


def check_settings(saved: str, own: str) -> None:
    """Refuse to go on with other settings than those with which a search began; both as JSON.

    Raises:
        StateError: a setting differs; it is named, with both values.
    """
    theirs, ours = (
        {".".join(path): value for path, value in flatten(json.loads(text)).items()} for text in (saved, own)
    )
    for name in sorted({*theirs, *ours}):
        before, now = (repr(one[name]) if name in one else "not there" for one in (theirs, ours))
        if before != now:
            raise StateError(
                f"the state is of a search with other settings: {name} is {before} in the state and {now} in this "
                "search; go on with the same settings, or begin anew in another folder"
            )
