"""Hard negatives that a run finds: `python -m gcl_jax.mine`."""
