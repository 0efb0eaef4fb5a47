"""The parts of `raybilevel run`: trials and upper-level steps on Ray, progress, refit, summary."""
