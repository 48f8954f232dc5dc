"""Sources of data, and the builder that writes a store from them: `python -m gcl_jax.prepare`."""
