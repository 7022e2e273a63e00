"""Saves and restores the checkpoints of a run, with orbax."""
