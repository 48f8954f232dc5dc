"""Exact search over a corpus, the command and the page: `python -m gcl_jax.search`."""
