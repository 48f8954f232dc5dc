"""Checkpoints of a run: written in the background, verified when they are read."""
