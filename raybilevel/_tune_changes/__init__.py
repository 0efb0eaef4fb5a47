"""Changes of Ray Tune, one a module; `applied` says which, and when they are in force."""
