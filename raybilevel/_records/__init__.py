"""The records of runs on disk: schema, files, summary. No Ray."""
