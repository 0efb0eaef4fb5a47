"""Gaussian processes of the value function v and of the upper level F, and acquisitions on them. No Ray."""
