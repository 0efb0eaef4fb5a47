"""Records on disk: one JSON file per run, written completely or not at all, and never overwritten."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from pydantic import ValidationError

from raybilevel._records.names import RECORDS_FOLDER
from raybilevel._records.record import FORMAT, Record, Settings
from raybilevel.errors import DataError

PART = ".part"


def path_of(problem_name: str, method_name: str, settings: Settings) -> Path:
    """The path of a record in the output folder.

    Names are for people. The digest keeps runs with other settings from being taken for this one.
    """
    text = json.dumps(settings.model_dump(mode="json"), sort_keys=True)
    # 32 bits, among the few runs of one method, problem and seed.
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return Path(RECORDS_FOLDER) / problem_name / f"{method_name}-seed{settings.seed}-{digest}.json"


def read(path: Path) -> Record:
    """Read a record back.

    Raises:
        DataError: the file, which is named, is damaged, has another format version, or is not a record.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: half-written or damaged ({error})") from error
    if not isinstance(raw, dict) or "format" not in raw:
        raise DataError(f"{path}: not a record of a run")
    if raw["format"] != FORMAT:
        raise DataError(f"{path}: a record of format {raw['format']!r}; this version reads format {FORMAT}")
    try:
        return Record.model_validate(raw)
    except ValidationError as error:
        raise DataError(f"{path}: not a record of a run: {first_error(error)}") from error


def first_error(error: ValidationError) -> str:
    """The first mistake in a record, with the dotted name of its key."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


def write(path: Path, record: Record) -> None:
    """Write a record. A failed or damaged record at this path is first renamed to a numbered name."""
    set_aside(path)
    dump(path, record)
    # Last: before the record is whole, the one so far is all there is.
    path.with_suffix(PART).unlink(missing_ok=True)


def keep(path: Path, record: Record) -> None:
    """Write the record of a run so far to a file beside the final one."""
    dump(path.with_suffix(PART), record)


def left_over(path: Path) -> Record | None:
    """The record so far of a run that was cut off before its end; None without one. Its file gets a numbered name.

    Raises:
        DataError: as `read`.
    """
    part = path.with_suffix(PART)
    if not part.exists():
        return None
    # `write` was cut off between its two last steps, so the record itself is complete.
    if path.exists() and path.stat().st_mtime_ns >= part.stat().st_mtime_ns:
        part.unlink()
        return None
    record = read(part)
    part.rename(aside(path))
    return record


def dump(path: Path, record: Record) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(record.model_dump_json())
        file.flush()
        os.fsync(file.fileno())  # else a power loss after the rename may leave an empty record
    os.replace(temporary, path)


def set_aside(path: Path) -> None:
    if path.exists():
        path.rename(aside(path))


def aside(path: Path) -> Path:
    """The first free numbered name."""
    number = 1
    while (other := path.with_name(f"{path.name}.old{number}")).exists():
        number += 1
    return other


def read_all(folder: Path) -> tuple[list[Record], list[str]]:
    """The records of a folder in a fixed order, and the mistakes in its other files."""
    found, wrong = [], []
    for path in sorted(folder.glob(f"{RECORDS_FOLDER}/*/*.json")):
        try:
            found.append(read(path))
        except DataError as error:
            wrong.append(str(error))
    return found, wrong
