"""Embeddings of a store, in memory, on disk and for other programs: `python -m gcl_jax.embed`."""
