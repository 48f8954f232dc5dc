"""Checkpoints of other libraries in, trained models out: `python -m gcl_jax.port`."""
