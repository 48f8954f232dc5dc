"""HTML reports of one run or several: `python -m gcl_jax.report`."""
