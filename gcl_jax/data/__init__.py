"""Reading a store: random access, pixels, batches. Never imports jax: it runs in worker processes."""
