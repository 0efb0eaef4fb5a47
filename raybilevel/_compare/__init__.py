"""Comparisons: methods x problems x seeds on Ray Tune under one budget, with one record per run. See `command`."""
