"""Reading a store: random access, pixels, batches. No jax here: it runs in worker processes."""
