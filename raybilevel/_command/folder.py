"""The folder of a run and, if that is elsewhere, its storage. Both hold the config and the summary."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import pyarrow as pa

from raybilevel._cluster.storage import Storage, locate
from raybilevel._config.experiment import MAY_CHANGE, ExperimentConfig, read_config, resolved, resume_differences
from raybilevel._records.names import COMMAND_FILE, CONFIG_FILE, TUNE_FOLDER
from raybilevel.errors import ConfigError, StorageError


@dataclass(frozen=True)
class Options:
    """Options of the command that began a run, which `raybilevel resume` uses again.

    data:    folder of data files, absolute.
    address: of the cluster.
    storage: of trials and checkpoints.
    """

    data: str | None = None
    address: str | None = None
    storage: str | None = None


def keep_options(options: Options, out: Path, resume: bool = False) -> None:
    """Keep the options of a command; one that resumes a run keeps earlier ones that it does not give."""
    before = asdict(read_options(out) if resume else Options())
    kept = {name: value or before[name] for name, value in asdict(options).items()}
    out.mkdir(parents=True, exist_ok=True)
    (out / COMMAND_FILE).write_text(json.dumps(kept) + "\n", encoding="utf-8")


def read_options(out: Path) -> Options:
    """Options that were kept; none if there are none."""
    try:
        found = json.loads((out / COMMAND_FILE).read_text(encoding="utf-8"))
        return Options(**{field.name: found.get(field.name) for field in fields(Options)})
    except (OSError, ValueError, AttributeError):
        return Options()


def prepare_folder(out: Path, config: ExperimentConfig, resume: bool, place: Storage) -> None:
    """Write the config of a new run, or check that it may go on with the run to resume, and write what changed in it.

    Raises:
        ConfigError: there is a run already, or none to resume, or it has another config, or `out` cannot be written.
        StorageError: the storage cannot be reached.
    """
    saved = out / CONFIG_FILE
    try:
        begun = place.exists(TUNE_FOLDER)
        elsewhere = place.read(CONFIG_FILE) if resume and not saved.exists() and place.exists(CONFIG_FILE) else None
    except (pa.ArrowException, OSError) as error:
        raise StorageError(f"cannot reach the storage {place.path}: {error}") from error
    if resume:
        if not begun:
            raise ConfigError(f"--resume: there is no run in {place.path}; leave --resume out to begin one")
        if elsewhere is not None:  # the run began on another machine
            keep(CONFIG_FILE, elsewhere, out, place)
        # By content: a config that writes a default out is the same.
        if differences := resume_differences(read_config(saved), config):
            raise ConfigError(
                f"--resume: the config differs from the one in {saved}, with which the run began: "
                f"{'; '.join(differences)}. Only resources and search.{', search.'.join(sorted(MAY_CHANGE))} may "
                "change; for anything else begin another run"
            )
        keep(CONFIG_FILE, resolved(config), out, place)
        return
    if begun:
        raise ConfigError(
            f"{place.path} already holds a run; choose another --out (or --storage), or go on with it by --resume"
        )
    keep(CONFIG_FILE, resolved(config), out, place)


def keep(name: str, text: str, out: Path, place: Storage) -> None:
    """Write a file of the run to its folder and, if that is elsewhere, to the storage.

    Raises:
        ConfigError: the folder cannot be written.
        StorageError: the storage cannot be written.
    """
    here = locate(out)
    try:
        here.write(name, text)
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(f"cannot write to {out}: {getattr(error, 'strerror', None) or error}") from error
    if place.path == here.path:
        return
    try:
        place.write(name, text)
    except (pa.ArrowException, OSError) as error:
        raise StorageError(f"cannot write to the storage {place.path}: {error}") from error
