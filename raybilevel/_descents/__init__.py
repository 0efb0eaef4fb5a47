"""Hypergradients at trained weights, and the augmented Lagrangian of the published scheme. No Ray."""
