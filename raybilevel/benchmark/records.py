"""Records on disk: one JSON file a run, written whole or not at all, never overwritten."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raybilevel.benchmark.suite import FORMAT

Record = dict[str, Any]


class DamagedRecord(ValueError):  # noqa: N818
    """A file that is not a whole record."""


def read(path: Path) -> Record:
    """Raises DamagedRecord, naming the file."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DamagedRecord(f"{path}: half-written or damaged ({error})") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT or "observations" not in record:
        raise DamagedRecord(f"{path}: not a record of format {FORMAT}")
    return record


def write(path: Path, record: Mapping[str, Any]) -> None:
    """What is in the way, a failed or a damaged record, is set aside under a number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    set_aside(path)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(record, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def set_aside(path: Path) -> None:
    if path.exists():
        number = 1
        while (other := path.with_name(f"{path.name}.old{number}")).exists():
            number += 1
        path.rename(other)


def read_all(folder: Path) -> tuple[list[Record], list[str]]:
    """The records of a folder in a fixed order, and what is wrong with the other files."""
    found, wrong = [], []
    for path in sorted(folder.glob("records/*/*.json")):
        try:
            found.append(read(path))
        except DamagedRecord as error:
            wrong.append(str(error))
    return found, wrong
