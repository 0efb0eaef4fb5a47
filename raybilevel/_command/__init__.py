"""What `raybilevel run` does: trials and upper-level steps on Ray, progress, refit, summary."""
