"""Changes to Ray Tune, one a module."""
