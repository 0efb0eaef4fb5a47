"""Solvers of linear systems whose symmetric matrix is known only by its products. No Ray."""
