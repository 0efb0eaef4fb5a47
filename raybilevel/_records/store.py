"""Records on disk: one JSON file a run, written whole or not at all, never overwritten."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.suite import FORMAT

Record = dict[str, Any]
PART = ".part"


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
    set_aside(path)
    dump(path, record)
    path.with_suffix(PART).unlink(missing_ok=True)


def keep(path: Path, record: Mapping[str, Any]) -> None:
    """What a run has seen so far, beside the place of its record, until that is written."""
    dump(path.with_suffix(PART), record)


def left_over(path: Path) -> Record | None:
    """What a run had seen that was cut off before its record was written; it is set aside under a number."""
    part = path.with_suffix(PART)
    if not part.exists():
        return None
    if path.exists() and path.stat().st_mtime_ns >= part.stat().st_mtime_ns:  # cut off just after that
        part.unlink()
        return None
    record = read(part)
    part.rename(aside(path))
    return record


def dump(path: Path, record: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(record, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def set_aside(path: Path) -> None:
    if path.exists():
        path.rename(aside(path))


def aside(path: Path) -> Path:
    """The first name under a number that is free."""
    number = 1
    while (other := path.with_name(f"{path.name}.old{number}")).exists():
        number += 1
    return other


def read_all(folder: Path) -> tuple[list[Record], list[str]]:
    """The records of a folder in a fixed order, and what is wrong with the other files."""
    found, wrong = [], []
    for path in sorted(folder.glob("records/*/*.json")):
        try:
            found.append(read(path))
        except DamagedRecord as error:
            wrong.append(str(error))
    return found, wrong
