"""Names that outlive a run: of the files in its folder, and of raybilevel's own methods in a comparison."""

from __future__ import annotations

TUNE_FOLDER = "tune"
CONFIG_FILE = "config.yaml"
SUMMARY_FILE = "summary.json"
RECORDS_FOLDER = "records"

OWN_METHODS = {"raybilevel": "default", "raybilevel-paper": "paper"}
"""How a comparison calls raybilevel's methods -> how `make_method` does."""
