"""Names that are stored on disk: of the files of a run, and of raybilevel's own methods in a comparison."""

from __future__ import annotations

TUNE_FOLDER = "tune"
TUNE_STATE = "experiment_state-*.json"
SEARCH_STATE = "searcher-state-"
CONFIG_FILE = "config.yaml"
COMMAND_FILE = "command.json"
SUMMARY_FILE = "summary.json"
RECORDS_FOLDER = "records"

OWN_METHODS = {"raybilevel": "default", "raybilevel-paper": "paper"}
"""A method's name in a comparison -> its name for `make_method`."""
