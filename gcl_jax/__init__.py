"""gcl_jax: Generalized Contrastive Learning for ranked multi-modal search, in JAX."""

__version__ = "0.1.0"
