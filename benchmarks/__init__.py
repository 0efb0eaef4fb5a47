"""How good a search is per training: problems x methods x seeds, counted in one currency; see `__main__`."""
