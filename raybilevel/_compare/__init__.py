"""Methods x problems x seeds on Ray Tune under one budget, one record a run; see `command`."""
