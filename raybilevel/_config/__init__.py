"""Config files: read once and checked completely. No Ray."""
