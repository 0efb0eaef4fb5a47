"""Changes of Ray Tune, one per module. `applied` lists them and says when they are in force."""
