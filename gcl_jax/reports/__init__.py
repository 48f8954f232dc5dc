"""What `gcl_jax.report` shows, section by section."""
