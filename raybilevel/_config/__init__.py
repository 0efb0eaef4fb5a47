"""Config files: read once, checked whole. No Ray."""
