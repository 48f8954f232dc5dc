"""What a step needs on devices that are not here: `python -m gcl_jax.plan`."""
