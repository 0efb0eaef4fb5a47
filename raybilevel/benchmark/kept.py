"""Measurements kept in files, so that a benchmark that was stopped goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from raybilevel.benchmark.families import write_json


def kept(file: Path, settings: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """From the file where it was made with the same settings, else measured and written there."""
    saved = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if saved.get("settings") != settings:
        saved = {"settings": settings, "found": measure()}
        write_json(file, saved)
    found: dict[str, Any] = saved["found"]
    return found
