"""Ranked evaluation, of a run or of any system: `python -m gcl_jax.evaluate`."""
