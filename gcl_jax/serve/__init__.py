"""Embedding and search for other programs, over HTTP: `python -m gcl_jax.serve`."""
