"""Ray without Tune: upper-level steps and what they are sent, storage, resources, time limits."""
