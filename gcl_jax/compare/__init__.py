"""What training gains on a store, and over what: `python -m gcl_jax.compare`."""
