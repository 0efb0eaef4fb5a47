"""Descents from trained weights: hypergradients at fixed x, and steps in (x, y) jointly. No Ray."""
