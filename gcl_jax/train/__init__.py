"""The training loop and what it is made of: `python -m gcl_jax.train`."""
